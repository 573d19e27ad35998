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
// A simdgroup has eight rows, or with FA_SPLIT_D 2 half of the head dims of eight rows. K and V have a memory each, so that two
// barriers a block are enough; where registers allow, V is on its way while Q is multiplied by K, the next K while P is by V.
// Grid: row blocks, kv heads, batch.
#pragma once

#include "metal/online_softmax.metal"
#include "metal/score_tile.metal"
#include "metal/unused_rows.metal"

namespace flash_attn {

static_assert(FA_BQ * FA_SPLIT_D == FA_SIMDGROUPS * fragment_size, "a simdgroup has eight rows");
#ifdef FA_DROPOUT
static_assert(FA_BK <= 32, "one call of Philox serves a block");
#endif

}  // namespace flash_attn

FA_BODY
using namespace flash_attn;
threadgroup KeyElement k_memory[key_memory_size];
threadgroup KeyElement v_memory[value_memory_size];
#if FA_SPLIT_D > 1
threadgroup float partial_scores[partial_scores_size];
#endif
#ifdef FA_PAGED
threadgroup short missing_keys[FA_BK];
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
    out, lse, thread_index, threads);
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
const int query = sequence.q.begin + row.query;
const ScoreRow score_row = score_row_of(params, sequence, row, alibi_slopes, attn_mask_shape, attn_mask_strides);
const ScoreScale scale = score_scale(params);

const auto places = keys_of(params, sequence, block_table);
#ifndef FA_K_CODES
const auto k_rows = key_rows(places, key_tensor<FA_D>(k, k_strides), kv_head);
const auto v_rows = key_rows(places, key_tensor<FA_DV>(v, v_strides), kv_head);
#elif FA_K_CODES == 1
const auto k_rows = key_rows(places, int8_tensor<FA_D>(k, k_strides, k_scales, k_scales_strides), kv_head);
const auto v_rows = key_rows(places, int8_tensor<FA_DV>(v, v_strides, v_scales, v_scales_strides), kv_head);
#else
const auto k_rows = key_rows(
    places, affine_tensor<FA_K_CODES, FA_D>(k, k_strides, k_scales, k_scales_strides, k_biases, k_biases_strides), kv_head);
const auto v_rows = key_rows(
    places, affine_tensor<FA_V_CODES, FA_DV>(v, v_strides, v_scales, v_scales_strides, v_biases, v_biases_strides), kv_head);
#endif
threadgroup KeyElement* const K = k_memory;
threadgroup KeyElement* const V = shares_memory ? k_memory : v_memory;
// This simdgroup's head dims.
const int dim_begin = part * dim_tiles * fragment_size;
const int value_dim_begin = part * value_tiles * fragment_size;

Tile<dim_tiles, FA_T> Q;
load_row(Q, q + query_strides(q_strides).offset(sequence.batch, query, row.head), dim_begin, FA_D, place);
#ifdef FA_QV
Tile<value_tiles, FA_T> Qv;
load_row(Qv, qv + query_strides(qv_strides).offset(sequence.batch, query, row.head), value_dim_begin, FA_DV, place);
#endif
Tile<value_tiles> O;
O.fill(0.0f);
SoftmaxRow softmax = start_softmax(learnable_sink, row.head, lane);

int key = keys.begin / FA_BK * FA_BK;
KeyLoad first_k;
first_k.load(k_rows, key, keys, thread_index);
store_keys(first_k, K, thread_index);
if (scores_values) {
  ValueLoad first_v;
  first_v.load(v_rows, key, keys, thread_index);
  store_values(first_v, V, thread_index);
}
for (; key < keys.end; key += FA_BK) {
  const bool sees_block = sees(seen.some, key, key + FA_BK);
  ValueLoad next_v;
  KeyLoad next_k;
  threadgroup_barrier(mem_flags::mem_threadgroup);  // K is there; V is free
  if (loads_early && !scores_values) next_v.load(v_rows, key, keys, thread_index);
#ifdef FA_PAGED
  find_missing(missing_keys, places, key, keys, thread_index);
#endif

  Tile<key_tiles> S;
  S.fill(0.0f);
  if (sees_block) multiply_by_keys(S, Q, K + 2 * dim_begin, key, seen.some, place);
#ifdef FA_QV
  if (sees_block) multiply_by_scored_values(S, Qv, V + value_dim_begin, key, seen.some, place);
#endif
#if FA_SPLIT_D > 1
  store_part(S, partial_scores, simdgroup, lane);
#endif

  if (shares_memory) threadgroup_barrier(mem_flags::mem_threadgroup);
  if (!loads_early && !scores_values) next_v.load(v_rows, key, keys, thread_index);
  if (!scores_values) store_values(next_v, V, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // V is there; K is free
  if (loads_early) next_k.load(k_rows, key + FA_BK, keys, thread_index);

  if (sees_block) {
#if FA_SPLIT_D > 1
    add_part(S, partial_scores, simdgroup ^ 1u, lane);
#endif
    finish_scores(S, scale, score_row, key, seen, place, attn_mask);
#ifdef FA_PAGED
    hide_missing(S, missing_keys, place);
#endif
    const float alpha = online_softmax(S, softmax);
    drop(S, score_row, key, place, params, dropout_key);
    O.scale_rows(alpha);
    multiply_by_values(O, S, V + value_dim_begin, key, seen.some, place);
  }

  if (shares_memory || scores_values) threadgroup_barrier(mem_flags::mem_threadgroup);
  if (!loads_early) next_k.load(k_rows, key + FA_BK, keys, thread_index);
  store_keys(next_k, K, thread_index);
  if (scores_values) {
    next_v.load(v_rows, key + FA_BK, keys, thread_index);
    store_values(next_v, V, thread_index);
  }
}

const RowEnd end = end_of_row(softmax, dropout_scale(params));
O.scale_rows(end.scale);
if (packed_row < block_end) {
  store_row<FA_T>(out + out_offset(params, sequence.batch, query, row.head, FA_DV), O, value_dim_begin, FA_DV, place);
  if (part == 0 && is_first_of_row(lane)) lse[lse_offset(params, sequence.batch, query, row.head)] = end.lse;
}
