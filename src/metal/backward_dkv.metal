// dK and dV of FA_BK keys of a kv head (FlashAttention-2, algorithm 2). A simdgroup owns eight keys, or with FA_SPLIT_D a
// part of the head dims of eight keys, and keeps their K^T, V^T, dK^T and dV^T in registers.
//
//   for each block of packed rows, of which some see the keys:
//     S     = Q K^T,  P = 2^(S - lse)                      [rows][keys]
//     dP    = dO V^T
//     dS    = P o (dropout(dP) - D) o softcap'
//     dV^T += dO^T dropout(P)                              [head dims][keys]
//     dK^T += Q^T dS
//   dK *= scale
//
// Rows come in order, those of the group's heads among them, and one simdgroup adds them up: every sum has one order. With the
// gradients transposed, scores stand as in forward, and P and dS are operands as they are.
// Grid: key blocks, kv heads, batch.
#include "metal/gradient_tile.metal"
#include "metal/row_block.metal"

namespace flash_attn {

static_assert(FA_BK * FA_SPLIT_D == FA_SIMDGROUPS * fragment_size, "a simdgroup has eight keys");

FA_CONSTANT int row_tiles = FA_BQ / fragment_size;
FA_CONSTANT int parts_size = FA_SPLIT_D > 1 ? FA_SIMDGROUPS * row_tiles * part_size : 1;

struct RowRange {
  int begin;
  int end;
};

/// Packed rows outside see none of `keys`. Both ends of what a query sees never move left from one query to the next.
FA_FN RowRange rows_that_see(MaskRule rule, KeyRange keys) {
  int begin = 0;
  for (int high = rule.seqlen_q; begin < high;) {
    const int query = (begin + high) / 2;
    if (visible_keys(rule, query).end > keys.begin) {
      high = query;
    } else {
      begin = query + 1;
    }
  }
  int end = begin;
  for (int high = rule.seqlen_q; end < high;) {
    const int query = (end + high) / 2;
    if (visible_keys(rule, query).begin < keys.end) {
      end = query + 1;
    } else {
      high = query;
    }
  }
  return {begin * FA_GROUP, end * FA_GROUP};
}

/// Whether one of eight packed rows from `first` on sees one of eight keys.
FA_FN bool sees_keys(MaskRule rule, int first, int end, int key) {
  return sees(seen_keys(rule, first, min_of(first + fragment_size, end)).some, key, key + fragment_size);
}

// What simdgroups ask about the rows of a block, in threadgroup memory.
struct BlockRows {
  threadgroup float* lse_log2;
  threadgroup float* delta;
  threadgroup int* keys;  // begin and end of what each sees

  FA_FN GradientRow row(int i, ScoreRow score) const thread {
    score.keys = {keys[2 * i], keys[2 * i + 1]};
    return {score, lse_log2[i], delta[i]};
  }
};

/// Packed rows from `first` on; those from `end` on see nothing.
template <class Lse, class Delta>
FA_FN void load_block_rows(
    BlockRows block, Params params, Sequence sequence, int kv_head, int first, int end, Lse lse, Delta delta,
    uint thread_index) {
  for (int i = int(thread_index); i < FA_BQ; i += threads) {
    const QueryRow row = query_of_row(min_of(first + i, end - 1), kv_head);
    const long place = lse_offset(params, sequence.batch, sequence.q.begin + row.query, row.head);
    const KeyRange keys = visible_keys(sequence.rule, row.query);
    const float row_lse = first + i < end ? lse_log2(lse[place], keys) : infinity;
    block.lse_log2[i] = row_lse;
    block.delta[i] = delta[place];
    block.keys[2 * i] = keys.begin;
    block.keys[2 * i + 1] = row_lse == infinity ? 0 : keys.end;
  }
}

#ifdef FA_DROPOUT
static_assert(32 % FA_BK == 0, "one call of Philox serves a block");

/// Of packed rows from `first` on. A call serves all simdgroups' keys, so each makes those of its share of the rows.
template <class Key>
FA_FN void load_dropout(
    threadgroup uint* kept, Params params, Sequence sequence, int kv_head, int first, int end, int key, Key philox_key,
    uint simdgroup, uint lane, LanePlace place) {
  for (int t = int(simdgroup); t < row_tiles; t += FA_SIMDGROUPS) {
    const QueryRow query = query_of_row(min_of(first + t * fragment_size + place.row, end - 1), kv_head);
    kept[t * 32 + int(lane)] = kept_keys(
        params, dropout_head(params, sequence.batch, query.head), uint(query.query), key + place.column, philox_key);
  }
}

FA_FN Dropout stored_dropout(const threadgroup uint* kept, Params params, short tile, uint lane) {
  return {kept[tile * 32 + int(lane)], dropout_scale(params)};
}
#else
FA_FN void load_dropout(Absent, Params, Sequence, int, int, int, int, Absent, uint, uint, LanePlace) {}
FA_FN KeepsAll stored_dropout(Absent, Params, short, uint) { return {}; }
#endif

// Packed rows `first` and on, of q or dout.
template <class Pointer>
struct QueryRows {
  Pointer query_0;  // of the sequence, head 0
  RowStrides strides;
  int kv_head;
  int first;
  BlockRows block;

  FA_FN bool has(int i) const thread { return block.lse_log2[i] != infinity; }
  FA_FN Pointer row(int i) const thread {
    const QueryRow row = query_of_row(first + i, kv_head);
    return query_0 + strides.offset(0, row.query, row.head);
  }
};

template <class Pointer>
FA_FN QueryRows<Pointer> query_rows(
    Pointer tensor, RowStrides strides, Sequence sequence, int kv_head, int first, BlockRows block) {
  return {tensor + strides.offset(sequence.batch, sequence.q.begin, 0), strides, kv_head, first, block};
}

/// Eight rows as columns: head dims from `first` on, zeros past the last and in rows that it has not.
template <int columns, class Rows>
FA_FN void load_transposed(thread Tile<columns, FA_T>& tile, Rows rows, int first, int dims, LanePlace place) {
  FA_UNROLL
  for (short i = 0; i < 2; ++i) {
    const bool is_there = rows.has(place.column + i);
    const auto row = rows.row(place.column + i);
    FA_UNROLL
    for (short d = 0; d < columns; ++d) {
      const int dim = first + d * fragment_size + place.row;
      tile.fragment[d][i] = is_there && dim < dims ? row[dim] : FA_T(0.0f);
    }
  }
}

/// A B of eight stored rows and eight columns in registers.
template <int columns>
FA_FN Fragment<float> product_ab(
    ConstStoredRows a, int pitch_of_a, thread const Tile<columns, FA_T>& b, LanePlace place) {
  Fragment<float> sum = Fragment<float>(0.0f);
  FA_UNROLL
  for (short d = 0; d < columns; ++d) {
    multiply_accumulate(sum, load_fragment<FA_T>(a + d * fragment_size, place, pitch_of_a, 1), b.fragment[d]);
  }
  return sum;
}

/// C += A^T B of eight stored rows and eight rows of B, eight columns wide: C [dims][8].
template <int columns>
FA_FN void accumulate_atb(
    thread Tile<columns>& c, ConstStoredRows a, int pitch_of_a, Fragment<float> b, LanePlace place) {
  FA_UNROLL
  for (short d = 0; d < columns; ++d) {
    multiply_accumulate(c.fragment[d], load_fragment<FA_T>(a + d * fragment_size, place, 1, pitch_of_a), b);
  }
}

/// Offset of a row of k's slot in a contiguous tensor [batch, rows, heads, dim] or [rows, heads, dim].
FA_FN long key_offset(Params params, int batch, int row, int kv_head, int dim) {
#ifdef FA_VARLEN
  const long place = row;
#else
  const long place = long(batch) * params[param_max_seqlen_k] + row;
#endif
  return (place * params[param_heads_k] + kv_head) * dim;
}

/// This lane's elements of a transposed gradient: head dims from `first_dim` on of the keys in its columns.
template <int dims, int columns, class Pointer>
FA_FN void store_key_gradient(
    Pointer to, Params params, Sequence sequence, int kv_head, int key, int first_dim,
    thread const Tile<columns>& gradient, float scale, LanePlace place) {
  FA_UNROLL
  for (short i = 0; i < 2; ++i) {
    const int column = key + place.column + i;
    if (column >= sequence.k.length) continue;
    const Pointer row = to + key_offset(params, sequence.batch, sequence.k.begin + column, kv_head, dims);
    FA_UNROLL
    for (short d = 0; d < columns; ++d) {
      const int dim = first_dim + d * fragment_size + place.row;
      if (dim < dims) row[dim] = FA_T(gradient.fragment[d][i] * scale);
    }
  }
}

/// Rows of the slot that belong to no sequence, every so many from `first` on.
template <int dims, class Pointer>
FA_FN void zero_unused_keys(
    Pointer to, Params params, Sequence sequence, int kv_head, int first, int step, uint thread_index) {
  for (int i = first; i < unused_rows(sequence.k); i += step) {
    const Pointer row = to + key_offset(params, sequence.batch, unused_row(sequence.k, i), kv_head, dims);
    for (int dim = int(thread_index); dim < dims; dim += threads) row[dim] = FA_T(0.0f);
  }
}

}  // namespace flash_attn

FA_BODY
using namespace flash_attn;
threadgroup FA_T q_memory[FA_BQ * pitch];
threadgroup FA_T dout_memory[FA_BQ * value_pitch];
threadgroup float lse_memory[2 * FA_BQ];
threadgroup float delta_memory[2 * FA_BQ];
threadgroup int keys_memory[4 * FA_BQ];
threadgroup float parts[parts_size];
#ifdef FA_DROPOUT
threadgroup uint dropout_memory[row_tiles * 32];
#else
const Absent dropout_memory;
#endif

const int block = int(threadgroup_position_in_grid.x);
const int kv_head = int(threadgroup_position_in_grid.y);
const uint thread_index = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const LanePlace place = place_of_lane(lane);
const Sequence sequence = sequence_of(params, int(threadgroup_position_in_grid.z), lane, FA_SEQUENCE_ARRAYS);

#if defined(FA_VARLEN) || defined(FA_SEQUSED_K)
const int blocks = blocks_of(params[param_max_seqlen_k], FA_BK);
zero_unused_keys<FA_D>(dk, params, sequence, kv_head, block, blocks, thread_index);
zero_unused_keys<FA_DV>(dv, params, sequence, kv_head, block, blocks, thread_index);
#endif

const KeyRange keys = {block * FA_BK, min_of(block * FA_BK + FA_BK, sequence.k.length)};
if (keys.begin >= keys.end) return;
const RowRange rows = rows_that_see(sequence.rule, keys);

const int key = keys.begin + int(simdgroup) / FA_SPLIT_D * fragment_size;
const int part = int(simdgroup) % FA_SPLIT_D;
const int dim = part * dim_tiles * fragment_size;
const int value_dim = part * value_tiles * fragment_size;
const ScoreScale scale = score_scale(params);

Tile<dim_tiles, FA_T> K;
load_transposed(K, key_rows(k, key_strides(k_strides), sequence, kv_head, key, keys), dim, FA_D, place);
Tile<value_tiles, FA_T> V;
load_transposed(V, key_rows(v, key_strides(v_strides), sequence, kv_head, key, keys), value_dim, FA_DV, place);
Tile<dim_tiles> dK;
dK.fill(0.0f);
Tile<value_tiles> dV;
dV.fill(0.0f);

int buffer = 0;
for (int first = rows.begin; first < rows.end; first += FA_BQ) {
  // Two of them, so that the next block's can be loaded while simdgroups still read these.
  const BlockRows block_rows = {
      lse_memory + buffer * FA_BQ, delta_memory + buffer * FA_BQ, keys_memory + buffer * 2 * FA_BQ};
  buffer = 1 - buffer;
  load_block_rows(block_rows, params, sequence, kv_head, first, rows.end, lse, delta, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_rows<FA_D, FA_BQ>(
      q_memory, query_rows(q, query_strides(q_strides), sequence, kv_head, first, block_rows), thread_index);
  load_rows<FA_DV, FA_BQ>(
      dout_memory, query_rows(dout, query_strides(dout_strides), sequence, kv_head, first, block_rows), thread_index);
  load_dropout(
      dropout_memory, params, sequence, kv_head, first, rows.end, keys.begin, dropout_key, simdgroup, lane, place);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int end = min_of(first + FA_BQ, rows.end);
  const bool every_row =
      contains(seen_keys(sequence.rule, first, end).every, key, key + fragment_size) && end - first == FA_BQ;
  Tile<row_tiles> S;
  S.fill(0.0f);
  Tile<row_tiles> dP;
  dP.fill(0.0f);
  FA_UNROLL
  for (short t = 0; t < row_tiles; ++t) {
    if (!every_row && !sees_keys(sequence.rule, first + t * fragment_size, rows.end, key)) continue;
    S.fragment[t] = product_ab(q_memory + t * fragment_size * pitch + dim, pitch, K, place);
    dP.fragment[t] = product_ab(dout_memory + t * fragment_size * value_pitch + value_dim, value_pitch, V, place);
  }
  add_parts(S, dP, parts, simdgroup, lane);

  FA_UNROLL
  for (short t = 0; t < row_tiles; ++t) {
    if (!every_row && !sees_keys(sequence.rule, first + t * fragment_size, rows.end, key)) continue;
    const int i = t * fragment_size + place.row;
    const QueryRow query = query_of_row(min_of(first + i, rows.end - 1), kv_head);
    const GradientRow row =
        block_rows.row(i, score_row_of(params, sequence, query, alibi_slopes, attn_mask_shape, attn_mask_strides));
    const ScoreGradient gradient = score_gradient(
        S.fragment[t], dP.fragment[t], row, key + place.column, every_row, scale,
        stored_dropout(dropout_memory, params, t, lane), attn_mask);
    const Fragment<float> dS = dot_gradient(gradient.ds, S.fragment[t], scale);
    accumulate_atb(dV, dout_memory + t * fragment_size * value_pitch + value_dim, value_pitch, gradient.p, place);
    accumulate_atb(dK, q_memory + t * fragment_size * pitch + dim, pitch, dS, place);
  }
}

store_key_gradient<FA_D>(
    dk, params, sequence, kv_head, key, dim, dK, float_param(params, param_softmax_scale), place);
store_key_gradient<FA_DV>(dv, params, sequence, kv_head, key, value_dim, dV, 1.0f, place);
