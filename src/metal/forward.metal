// Forward of FA_BQ packed rows of a kv head (FlashAttention-2, algorithm 1).
//
//   for each block of keys that some row sees:
//     S  = Q K^T                          [rows][keys], log2 units
//     S  = mask(ALiBi(softcap(S)))
//     m' = max(m, rowmax(S));  alpha = 2^(m - m')
//     P  = 2^(S - m');  l = alpha l + rowsum(P)
//     O  = alpha O + dropout(P) V         [rows][head dims]
//   O = O / l;  lse = ln 2 (m + log2 l)
//
// A simdgroup has eight rows, or with FA_SPLIT_D 2 half of the head dims of eight rows. K of the next block is on its way while
// this one is multiplied by V, V while Q is multiplied by K: two barriers a block. Grid: row blocks, kv heads, batch.
#pragma once

#include "metal/key_block.metal"
#include "metal/online_softmax.metal"

namespace flash_attn {

static_assert(FA_BQ * FA_SPLIT_D == FA_SIMDGROUPS * fragment_size, "a simdgroup has eight rows");
static_assert(FA_BK <= 32, "one call of Philox serves a block");

/// Head dims from dim_begin on of one row; zeros past the last.
template <int columns, class Pointer>
METAL_FUNC void load_query(thread Tile<columns, FA_T>& q, Pointer row, int dim_begin, int dims, LanePlace place) {
  FA_UNROLL
  for (short d = 0; d < columns; ++d) {
    const int dim = dim_begin + d * fragment_size + place.column;
    q.fragment[d] = Fragment<FA_T>(dim < dims ? row[dim] : FA_T(0.0f), dim + 1 < dims ? row[dim + 1] : FA_T(0.0f));
  }
}

/// S = Q K^T of the fragments that hold keys of `seen`.
METAL_FUNC void multiply_by_keys(
    thread Tile<key_tiles>& s, thread const Tile<dim_tiles, FA_T>& q, const threadgroup Stored* k, int key, KeyRange seen,
    LanePlace place) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = j * fragment_size;
    if (!sees(seen, key + first, key + first + fragment_size)) continue;
    FA_UNROLL
    for (short d = 0; d < dim_tiles; ++d) {
      multiply_accumulate(s.fragment[j], q.fragment[d], key_fragment(k, d * fragment_size, first, place));
    }
  }
}

#ifdef FA_QV
/// S += Qv V^T, likewise.
METAL_FUNC void multiply_by_scored_values(
    thread Tile<key_tiles>& s, thread const Tile<value_tiles, FA_T>& qv, const threadgroup Stored* v, int key, KeyRange seen,
    LanePlace place) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = j * fragment_size;
    if (!sees(seen, key + first, key + first + fragment_size)) continue;
    FA_UNROLL
    for (short d = 0; d < value_tiles; ++d) {
      multiply_accumulate(s.fragment[j], qv.fragment[d], transposed_value_fragment(v, d * fragment_size, first, place));
    }
  }
}
#endif

/// O += P V of the fragments that hold keys of `seen`.
METAL_FUNC void multiply_by_values(
    thread Tile<value_tiles>& o, thread const Tile<key_tiles>& p, const threadgroup Stored* v, int key, KeyRange seen,
    LanePlace place) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = j * fragment_size;
    if (!sees(seen, key + first, key + first + fragment_size)) continue;
    FA_UNROLL
    for (short d = 0; d < value_tiles; ++d) {
      multiply_accumulate(o.fragment[d], p.fragment[j], value_fragment(v, first, d * fragment_size, place));
    }
  }
}

/// Scores of the row's keys from `key` on; `edge`: the row may not see all of them.
template <class Mask, class Missing>
METAL_FUNC void finish_scores(
    thread Tile<key_tiles>& s, ScoreScale scale, ScoreRow row, int key, bool edge, LanePlace place, Mask mask,
    Missing missing) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      const int column = key + j * fragment_size + place.column + i;
      s.fragment[j][i] = score(s.fragment[j][i], scale, row, column, mask);
      if (edge) s.fragment[j][i] = hidden(s.fragment[j][i], row, column);
      if (is_missing(missing, column - key)) s.fragment[j][i] = minus_infinity;
    }
  }
}

METAL_FUNC void drop(thread Tile<key_tiles>&, ScoreRow, int, LanePlace, const device int*, Absent) {}

#ifdef FA_DROPOUT
template <class Key>
METAL_FUNC void drop(
    thread Tile<key_tiles>& p, ScoreRow row, int key, LanePlace place, const device int* params, Key philox_key) {
  const DropoutCall call = dropout_call(params, philox_key, row.dropout_head, row.query, uint(key + place.column));
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      if (!call.keeps(row.query, uint(key + j * fragment_size + place.column + i))) p.fragment[j][i] = 0.0f;
    }
  }
}
#endif

// ---- two simdgroups share rows: each adds the other's part of S, lane by lane

METAL_FUNC threadgroup float* part_of_lane(threadgroup float* parts, uint simdgroup, short j, uint lane) {
  return parts + ((simdgroup * key_tiles + j) * 32 + lane) * 2;
}

METAL_FUNC void store_part(thread const Tile<key_tiles>& s, threadgroup float* parts, uint simdgroup, uint lane) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    threadgroup float* part = part_of_lane(parts, simdgroup, j, lane);
    part[0] = s.fragment[j].x;
    part[1] = s.fragment[j].y;
  }
}

METAL_FUNC void add_part(thread Tile<key_tiles>& s, threadgroup float* parts, uint simdgroup, uint lane) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const threadgroup float* part = part_of_lane(parts, simdgroup, j, lane);
    s.fragment[j] += Fragment<float>(part[0], part[1]);
  }
}

// ---- results

/// Head dims from dim_begin on of one row.
template <class Pointer>
METAL_FUNC void store_output(Pointer row, thread const Tile<value_tiles>& o, int dim_begin, LanePlace place) {
  FA_UNROLL
  for (short d = 0; d < value_tiles; ++d) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      const int dim = dim_begin + d * fragment_size + place.column + i;
      if (dim < FA_DV) row[dim] = FA_T(o.fragment[d][i]);
    }
  }
}

/// Rows of the slot that belong to no sequence, every so many from `first` on.
template <class Out, class Lse>
METAL_FUNC void zero_unused_rows(
    const device int* params, Sequence sequence, int kv_head, int first, int step, Out out, Lse lse, uint thread_index) {
  const int head = kv_head * FA_GROUP;
  for (int i = first; i < unused_rows(sequence.q); i += step) {
    const int row = unused_row(sequence.q, i);
    const Out row_of_heads = out + out_offset(params, sequence.batch, row, head, FA_DV);
    for (int dim = int(thread_index); dim < FA_GROUP * FA_DV; dim += threads) row_of_heads[dim] = FA_T(0.0f);
    for (int member = int(thread_index); member < FA_GROUP; member += threads) {
      lse[lse_offset(params, sequence.batch, row, head + member)] = minus_infinity;
    }
  }
}

}  // namespace flash_attn

FA_BODY
using namespace flash_attn;
threadgroup Stored k_memory[key_memory_size];
threadgroup Stored v_memory[value_memory_size];
threadgroup float partial_scores[partial_scores_size];
#ifdef FA_PAGED
threadgroup short missing_keys[FA_BK];
#else
const Absent missing_keys = {};
#endif

const int kv_head = int(threadgroup_position_in_grid.y);
const uint thread_index = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const LanePlace place = place_of_lane(lane);
const Sequence sequence = sequence_of(params, int(threadgroup_position_in_grid.z), lane, FA_SEQUENCE_ARRAYS);

#if defined(FA_VARLEN) || defined(FA_SEQUSED_Q)
zero_unused_rows(
    params, sequence, kv_head, int(threadgroup_position_in_grid.x), blocks_of(params[param_max_seqlen_q] * FA_GROUP, FA_BQ),
    out, lse, thread_index);
#endif

// The last rows see the most keys: they start first.
const int block = blocks_of(packed_rows(sequence), FA_BQ) - 1 - int(threadgroup_position_in_grid.x);
if (block < 0) return;
const int block_begin = block * FA_BQ;
const int block_end = min_of(block_begin + FA_BQ, packed_rows(sequence));
const KeyRange keys = seen_keys(sequence.rule, block_begin, block_end).some;

// A row past the last repeats it, and is not stored.
const int tile_begin = block_begin + int(simdgroup) / FA_SPLIT_D * fragment_size;
const int part = int(simdgroup) % FA_SPLIT_D;
const int packed_row = tile_begin + place.row;
const SeenKeys seen = seen_keys(sequence.rule, tile_begin, min_of(tile_begin + fragment_size, block_end));
const QueryRow row = query_of_row(min_of(packed_row, block_end - 1), kv_head);
const ScoreRow score_row = score_row_of(params, sequence, row, alibi_slopes, attn_mask_shape, attn_mask_strides);
const ScoreScale scale = score_scale(params);

const auto places = keys_of(params, sequence, block_table);
const auto k_rows = key_rows(
    places, key_tensor<FA_K_CODES, FA_D>(k, k_strides, k_scales, k_scales_strides, k_biases, k_biases_strides), kv_head);
const auto v_rows = key_rows(
    places, key_tensor<FA_V_CODES, FA_DV>(v, v_strides, v_scales, v_scales_strides, v_biases, v_biases_strides), kv_head);
threadgroup Stored* const K = k_memory;
threadgroup Stored* const V = shares_memory ? k_memory : v_memory;
// This simdgroup's head dims.
const int dim_begin = part * dim_tiles * fragment_size;
const int value_dim_begin = part * value_tiles * fragment_size;

Tile<dim_tiles, FA_T> Q;
load_query(Q, q + query_strides(q_strides).offset(sequence.batch, sequence.q.begin + row.query, row.head), dim_begin, FA_D, place);
#ifdef FA_QV
Tile<value_tiles, FA_T> Qv;
load_query(
    Qv, qv + query_strides(qv_strides).offset(sequence.batch, sequence.q.begin + row.query, row.head), value_dim_begin, FA_DV,
    place);
#endif
Tile<value_tiles> O;
O.fill(0.0f);
SoftmaxRow softmax = start_softmax(learnable_sink, row.head, lane);

int key = keys.begin / FA_BK * FA_BK;
load_keys(K, k_rows, key, keys, thread_index);
if (scores_values) load_values(V, v_rows, key, keys, thread_index);
for (; key < keys.end; key += FA_BK) {
  const bool sees_block = sees(seen.some, key, key + FA_BK);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // K is there; V is free
  if (overlaps) load_values(V, v_rows, key, keys, thread_index);
  find_missing(missing_keys, places, key, keys, thread_index);

  Tile<key_tiles> S;
  S.fill(0.0f);
  if (sees_block) multiply_by_keys(S, Q, K + 2 * dim_begin, key, seen.some, place);
#ifdef FA_QV
  if (sees_block) multiply_by_scored_values(S, Qv, V + value_dim_begin, key, seen.some, place);
#endif
  if (FA_SPLIT_D > 1) store_part(S, partial_scores, simdgroup, lane);

  threadgroup_barrier(mem_flags::mem_threadgroup);  // V is there; K is free
  if (overlaps) load_keys(K, k_rows, key + FA_BK, keys, thread_index);
  if (shares_memory) {
    load_values(V, v_rows, key, keys, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  if (sees_block) {
    if (FA_SPLIT_D > 1) add_part(S, partial_scores, simdgroup ^ 1u, lane);
    const bool edge = !contains(seen.every, key, key + FA_BK);
    finish_scores(S, scale, score_row, key, edge, place, attn_mask, missing_keys);
    const float alpha = online_softmax(S, softmax);
    drop(S, score_row, key, place, params, dropout_key);
    O.scale_rows(alpha);
    multiply_by_values(O, S, V + value_dim_begin, key, seen.some, place);
  }
  if (!overlaps) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_keys(K, k_rows, key + FA_BK, keys, thread_index);
    if (scores_values) load_values(V, v_rows, key + FA_BK, keys, thread_index);
  }
}

const RowEnd end = end_of_row(softmax, dropout_scale(params));
O.scale_rows(end.scale);
if (packed_row < block_end) {
  const int query = sequence.q.begin + row.query;
  store_output(
      out + out_offset(params, sequence.batch, query, row.head, FA_DV), O, value_dim_begin, place);
  if (part == 0 && is_first_of_row(lane)) lse[lse_offset(params, sequence.batch, query, row.head)] = end.lse;
}
