// Where the queries and keys of one sequence lie, and which rows of its blocks are which queries.
//
// A kv head's query heads share its K and V, so their rows are packed: row r is query r / FA_GROUP of the head's member
// r % FA_GROUP.
#pragma once

#include "metal/absent.metal"
#include "metal/params.h"
#include "semantics/mask.h"
#include "semantics/sequence.h"

namespace flash_attn {

// What MLX gives of a launch's numbers, and of an array's axes.
using Params = const device int*;
using Shape = const constant int*;
using Strides = const constant int64_t*;

// The slots of all sequences tile a packed tensor. Rows of a slot that are not in use belong to no sequence: its blocks zero
// them.
struct SequenceRows {
  int begin;   // first row in use
  int length;  // rows in use
  int slot_begin;
  int slot_end;
};

struct Sequence {
  int batch;
  SequenceRows q;
  SequenceRows k;  // with a cache: slots of its row
  int cache_row;   // of the cache, or of the block table
  MaskRule rule;
};

#ifdef FA_VARLEN
/// Where slot i begins: cu_seqlens that run backwards then still tile. Every lane of the simdgroup calls it.
template <class Starts>
FA_FN int slot_begin(Starts starts, int slot, int total, uint lane) {
  int begin = 0;
  for (int i = int(lane); i <= slot; i += 32) begin = max_of(begin, starts[i]);
  return min_of(simd_max(begin), total);
}

template <class Starts, class Used>
FA_FN SequenceRows rows_of_sequence(Starts starts, Used used, int batch, int batches, int total, int max_seqlen, uint lane) {
  const int floor = slot_begin(starts, batch, total, lane);
  const int length = entry_or(used, batch, max_seqlen);
  const Extent extent = sequence_extent(starts[batch], starts[batch + 1], floor, total, max_seqlen, length);
  const int slot_end = clamp_to(starts[batch + 1], extent.begin, total);
  return {extent.begin, extent.length, batch == 0 ? 0 : extent.begin, batch == batches - 1 ? total : slot_end};
}
#else
template <class Used>
FA_FN SequenceRows rows_of_sequence(Absent, Used used, int batch, int, int, int max_seqlen, uint) {
  return {0, clamp_to(entry_or(used, batch, max_seqlen), 0, max_seqlen), 0, max_seqlen};
}
#endif

FA_FN MaskRule mask_rule(Params params, int seqlen_q, int seqlen_k) {
#ifdef FA_CHUNK
  const int chunk = params[param_attention_chunk];
#else
  const int chunk = 0;
#endif
  return {seqlen_q, seqlen_k, params[param_window_left], params[param_window_right], chunk};
}

/// Every lane of the simdgroup calls it.
template <class StartsQ, class StartsK, class UsedQ, class UsedK, class Indices, class Leftpad>
FA_FN Sequence sequence_of(
    Params params, int batch, uint lane, StartsQ starts_q, StartsK starts_k, UsedQ used_q, UsedK used_k,
    Indices batch_idx, Leftpad leftpad) {
  const int batches = params[param_batch];
  Sequence sequence;
  sequence.batch = batch;
  sequence.q = rows_of_sequence(starts_q, used_q, batch, batches, params[param_total_q], params[param_max_seqlen_q], lane);
#ifdef FA_CACHED
  // Leftpad comes off the front of what the cache holds. A row that the cache lacks holds nothing.
#ifdef FA_PAGED
  const int rows = params[param_table_rows];
#else
  const int rows = params[param_cache_rows];
#endif
  const int capacity = params[param_key_capacity];
  const int row = entry_or(batch_idx, batch, batch);
  const bool exists = 0 <= row && row < rows;
  const int end = exists ? clamp_to(entry_or(used_k, batch, capacity), 0, capacity) : 0;
  const int begin = clamp_to(entry_or(leftpad, batch, 0), 0, end);
  sequence.k = {begin, end - begin, 0, capacity};
  sequence.cache_row = exists ? row : 0;
#else
  sequence.k = rows_of_sequence(starts_k, used_k, batch, batches, params[param_total_k], params[param_max_seqlen_k], lane);
  sequence.cache_row = batch;
#endif
  sequence.rule = mask_rule(params, sequence.q.length, sequence.k.length);
  return sequence;
}

#define FA_SEQUENCE_ARRAYS cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_batch_idx, cache_leftpad

// ---- rows that belong to no sequence

FA_FN int unused_rows(SequenceRows rows) { return rows.slot_end - rows.slot_begin - rows.length; }

/// Row i of them.
FA_FN int unused_row(SequenceRows rows, int i) {
  const int row = rows.slot_begin + i;
  return row < rows.begin ? row : row + rows.length;
}

// ---- offsets

struct RowStrides {
  long batch;
  long row;
  long head;

  FA_FN long offset(int sequence, int row_of_slot, int head_of_row) const thread {
    return sequence * batch + row_of_slot * row + head_of_row * head;
  }
};

/// From the strides of [batch, rows, heads, dim], or packed [rows, heads, dim].
FA_FN RowStrides dense_strides(Strides strides) {
  return {strides[0], strides[1], strides[2]};
}
FA_FN RowStrides packed_strides(Strides strides) {
  return {0, strides[0], strides[1]};
}

FA_FN RowStrides query_strides(Strides strides) {
#ifdef FA_VARLEN
  return packed_strides(strides);
#else
  return dense_strides(strides);
#endif
}

FA_FN RowStrides key_strides(Strides strides) {
#ifdef FA_CACHED
  return dense_strides(strides);
#else
  return query_strides(strides);
#endif
}

/// Of a row of q's slot in a contiguous tensor [batch, rows, heads, dim] or [rows, heads, dim].
FA_FN long out_offset(Params params, int batch, int row, int head, int dim) {
#ifdef FA_VARLEN
  const long place = row;
#else
  const long place = long(batch) * params[param_max_seqlen_q] + row;
#endif
  return (place * params[param_heads_q] + head) * dim;
}

/// ... in lse [batch, heads, rows] or [heads, rows].
FA_FN long lse_offset(Params params, int batch, int row, int head) {
#ifdef FA_VARLEN
  return long(head) * params[param_total_q] + row;
#else
  return (long(batch) * params[param_heads_q] + head) * params[param_max_seqlen_q] + row;
#endif
}

// ---- packed rows

struct QueryRow {
  int query;
  int head;
};

FA_FN QueryRow query_of_row(int row, int kv_head) { return {row / FA_GROUP, kv_head * FA_GROUP + row % FA_GROUP}; }

FA_FN int blocks_of(int rows, int block) { return (rows + block - 1) / block; }

FA_FN int packed_rows(Sequence sequence) { return sequence.q.length * FA_GROUP; }

// What packed rows see together.
struct SeenKeys {
  KeyRange some;   // a key outside is seen by none of them
  KeyRange every;  // a key inside is seen by all of them
};

FA_FN SeenKeys seen_keys(MaskRule rule, int row_begin, int row_end) {
  if (row_begin >= row_end) return {{0, 0}, {0, rule.seqlen_k}};
  const KeyRange first = visible_keys(rule, row_begin / FA_GROUP);
  const KeyRange last = visible_keys(rule, (row_end - 1) / FA_GROUP);
  return {{first.begin, last.end}, {last.begin, first.end}};
}

FA_FN bool sees(KeyRange keys, int key_begin, int key_end) { return keys.begin < key_end && key_begin < keys.end; }
FA_FN bool contains(KeyRange keys, int key_begin, int key_end) {
  return keys.begin <= key_begin && key_end <= keys.end;
}

}  // namespace flash_attn
