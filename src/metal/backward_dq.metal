// dQ of FA_BQ packed rows of a kv head. A simdgroup has eight rows, or with FA_SPLIT_D a part of the head dims of eight rows,
// and keeps their Q, dO and dQ in registers.
//
//   for each block of keys that some row sees:
//     S   = Q K^T,  P = 2^(S - lse)                        [rows][keys]
//     dP  = dO V^T
//     dS  = P o (dropout(dP) - D) o softcap'
//     dQ += dS K                                           [rows][head dims]
//   dQ *= scale
//
// Grid: row blocks, kv heads, batch.
#include "metal/query_tile.metal"

namespace flash_attn {

#ifdef FA_ATTN_MASK
FA_CONSTANT bool has_attn_mask = true;
#else
FA_CONSTANT bool has_attn_mask = false;
#endif

/// Keys of infinities and NaN as 0. What they make of rows that see them is in those rows' dS; the others must not meet them as
/// 0 * NaN.
FA_FN void drop_non_finite(StoredRows keys, uint thread_index) {
  constexpr int elements = 2 * stored_dims(FA_D);  // of a pair
  for (int i = int(thread_index); i < FA_BK / 2 * elements; i += threads) {
    const int place = i / elements * pair_pitch + i % elements;
    if (!(abs(float(keys[place])) <= -lowest_score)) keys[place] = FA_T(0.0f);
  }
}

/// dQ += dS K of eight keys that are stored in pairs.
FA_FN void accumulate_query_gradient(
    thread Tile<dim_tiles>& dq, Fragment<float> ds, ConstStoredRows k, LanePlace place) {
  const ConstStoredRows key = k + place.row / 2 * pair_pitch + place.row % 2 + 2 * place.column;
  FA_UNROLL
  for (short d = 0; d < dim_tiles; ++d) {
    const ConstStoredRows dims = key + 2 * d * fragment_size;
    multiply_accumulate(dq.fragment[d], ds, Fragment<FA_T>(dims[0], dims[2]));
  }
}

/// Rows of the slot that belong to no sequence, every so many from `first` on.
template <class Pointer>
FA_FN void zero_unused_queries(
    Pointer to, Params params, Sequence sequence, int kv_head, int first, int step, uint thread_index) {
  for (int i = first; i < unused_rows(sequence.q); i += step) {
    const Pointer row = to + out_offset(params, sequence.batch, unused_row(sequence.q, i), kv_head * FA_GROUP, FA_D);
    for (int dim = int(thread_index); dim < FA_GROUP * FA_D; dim += threads) row[dim] = FA_T(0.0f);
  }
}

}  // namespace flash_attn

FA_BODY
using namespace flash_attn;
threadgroup FA_T k_memory[FA_BK / 2 * pair_pitch];
threadgroup FA_T v_memory[FA_BK / 2 * value_pair_pitch];
threadgroup float parts[parts_size];

const int kv_head = int(threadgroup_position_in_grid.y);
const uint thread_index = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const LanePlace place = place_of_lane(lane);
const Sequence sequence = sequence_of(params, int(threadgroup_position_in_grid.z), lane, FA_SEQUENCE_ARRAYS);

#if defined(FA_VARLEN) || defined(FA_SEQUSED_Q)
zero_unused_queries(
    dq, params, sequence, kv_head, int(threadgroup_position_in_grid.x), blocks_of(params[param_max_seqlen_q] * FA_GROUP, FA_BQ),
    thread_index);
#endif

// The last rows see the most keys: they start first.
const int block = blocks_of(packed_rows(sequence), FA_BQ) - 1 - int(threadgroup_position_in_grid.x);
if (block < 0) return;
const int block_end = min_of(block * FA_BQ + FA_BQ, packed_rows(sequence));
const SeenKeys seen_by_block = seen_keys(sequence.rule, block * FA_BQ, block_end);
const KeyRange keys = seen_by_block.some;

// A row past the last repeats it, and is not stored.
const int tile_begin = block * FA_BQ + int(simdgroup) / FA_SPLIT_D * fragment_size;
const int part = int(simdgroup) % FA_SPLIT_D;
const SeenKeys seen = seen_keys(sequence.rule, tile_begin, min_of(tile_begin + fragment_size, block_end));
const QueryRow query = query_of_row(min_of(tile_begin + place.row, block_end - 1), kv_head);
const int row_in_slot = sequence.q.begin + query.query;
const ScoreRow score_row = score_row_of(params, sequence, query, alibi_slopes, attn_mask_shape, attn_mask_strides);
const long statistics = lse_offset(params, sequence.batch, row_in_slot, query.head);
const GradientRow row = gradient_row(score_row, lse_log2(lse[statistics], score_row.keys), delta[statistics]);
const ScoreScale scale = score_scale(params);

// This simdgroup's head dims.
const int dim = part * dim_tiles * fragment_size;
const int value_dim = part * value_tiles * fragment_size;
Tile<dim_tiles, FA_T> Q;
load_row(Q, q + query_strides(q_strides).offset(sequence.batch, row_in_slot, query.head), dim, FA_D, place);
Tile<value_tiles, FA_T> dO;
load_row(dO, dout + query_strides(dout_strides).offset(sequence.batch, row_in_slot, query.head), value_dim, FA_DV, place);
Tile<dim_tiles> dQ;
dQ.fill(0.0f);

for (int key = keys.begin / FA_BK * FA_BK; key < keys.end; key += FA_BK) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_pairs<FA_D, FA_BK>(k_memory, key_rows(k, key_strides(k_strides), sequence, kv_head, key, keys), thread_index);
  load_pairs<FA_DV, FA_BK>(v_memory, key_rows(v, key_strides(v_strides), sequence, kv_head, key, keys), thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  Tile<key_tiles> S;
  S.fill(0.0f);
  Tile<key_tiles> dP;
  dP.fill(0.0f);
  multiply_by_keys(S, dP, Q, dO, k_memory + 2 * dim, v_memory + 2 * value_dim, key, seen.some, place);
  add_parts(S, dP, parts, simdgroup, lane);
  if (has_attn_mask || !contains(seen_by_block.every, key, key + FA_BK)) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    drop_non_finite(k_memory, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  const auto dropout = dropout_of(params, row.score, key + place.column, dropout_key);
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = key + j * fragment_size;
    if (!sees(seen.some, first, first + fragment_size)) continue;
    const bool every = contains(seen.every, first, first + fragment_size);
    const ScoreGradient gradient =
        score_gradient(S.fragment[j], dP.fragment[j], row, first + place.column, every, scale, dropout, attn_mask);
    const Fragment<float> dS = dot_gradient(gradient.ds, S.fragment[j], scale);
    accumulate_query_gradient(dQ, dS, k_memory + j * fragment_size / 2 * pair_pitch + 2 * dim, place);
  }
}

dQ.scale_rows(float_param(params, param_softmax_scale));
if (tile_begin + place.row < block_end) {
  store_row<FA_T>(dq + out_offset(params, sequence.batch, row_in_slot, query.head, FA_D), dQ, dim, FA_D, place);
}
