// Gradient of attn_mask: dS itself, for the mask is added after softcap, summed over the axes along which the mask has size 1.
//
// A threadgroup owns FA_BQ rows and FA_BK keys of one head of the mask, or all where the mask has one for all. It walks what it
// sums in ascending order, so every sum has one order:
//
//   for each sequence, head, block of keys, block of rows:
//     S  = Q K^T,  P = 2^(S - lse)
//     dP = dO V^T
//     dM += P o (dropout(dP) - D)                          [rows][keys]
//
// Grid: key blocks x row blocks, heads and batch of the mask, which is [batch, heads, rows, keys].
#include "metal/query_tile.metal"

namespace flash_attn {

struct Range {
  int begin;
  int end;
};

/// Of an axis along which the mask has `size`: a block of it, or all `count` where it is broadcast.
FA_FN Range summed_range(int size, int block, int block_size, int count) {
  if (size == 1) return {0, count};
  return {block * block_size, min_of(block * block_size + block_size, count)};
}

/// Over the lanes that share a column of a fragment.
FA_FN float column_sum(float x) {
  x += simd_shuffle_xor(x, 2);
  x += simd_shuffle_xor(x, 4);
  return x + simd_shuffle_xor(x, 16);
}

/// All columns into the first.
FA_FN void add_columns(thread Tile<key_tiles>& tile) {
  float sum = 0.0f;
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) sum += tile.fragment[j].x + tile.fragment[j].y;
  tile.fill(row_sum(sum));
}

/// All rows of all simdgroups into each. Every simdgroup calls it.
FA_FN void add_rows(thread Tile<key_tiles>& tile, threadgroup float* sums, uint simdgroup, LanePlace place) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      const float sum = column_sum(tile.fragment[j][i]);
      if (place.row == 0) sums[int(simdgroup) * FA_BK + j * fragment_size + place.column + i] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tile.fill(0.0f);
  for (int other = 0; other < FA_SIMDGROUPS; other += FA_SPLIT_D) {
    FA_UNROLL
    for (short j = 0; j < key_tiles; ++j) {
      FA_UNROLL
      for (short i = 0; i < 2; ++i) {
        tile.fragment[j][i] += sums[other * FA_BK + j * fragment_size + place.column + i];
      }
    }
  }
}

}  // namespace flash_attn

FA_BODY
using namespace flash_attn;
threadgroup FA_T k_memory[FA_BK / 2 * pair_pitch];
threadgroup FA_T v_memory[FA_BK / 2 * value_pair_pitch];
threadgroup float parts[parts_size];
threadgroup float sums[FA_SIMDGROUPS * FA_BK];

const int mask_heads = attn_mask_shape[1];
const int mask_rows = attn_mask_shape[2];
const int mask_keys = attn_mask_shape[3];
const int key_blocks = blocks_of(mask_keys, FA_BK);
const int key_block = int(threadgroup_position_in_grid.x) % key_blocks;
const int row_block = int(threadgroup_position_in_grid.x) / key_blocks;
const int mask_head = int(threadgroup_position_in_grid.y);
const int mask_batch = int(threadgroup_position_in_grid.z);

const uint thread_index = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const LanePlace place = place_of_lane(lane);
const int part = int(simdgroup) % FA_SPLIT_D;
const int first_tile = int(simdgroup) / FA_SPLIT_D * fragment_size;
const int dim = part * dim_tiles * fragment_size;
const int value_dim = part * value_tiles * fragment_size;
const ScoreScale scale = score_scale(params);

Tile<key_tiles> dM;
dM.fill(0.0f);

const Range batches = summed_range(attn_mask_shape[0], mask_batch, 1, params[param_batch]);
const Range heads = summed_range(mask_heads, mask_head, 1, params[param_heads_q]);
for (int batch = batches.begin; batch < batches.end; ++batch) {
  const Sequence sequence = sequence_of(params, batch, lane, FA_SEQUENCE_ARRAYS);
  const Range rows = summed_range(mask_rows, row_block, FA_BQ, sequence.q.length);
  const Range keys = summed_range(mask_keys, key_block, FA_BK, sequence.k.length);
  const KeyRange seen_by_rows = visible_keys_of_rows(sequence.rule, rows.begin, rows.end);
  for (int head = heads.begin; head < heads.end; ++head) {
    for (int key = keys.begin; key < keys.end; key += FA_BK) {
      if (!sees(seen_by_rows, key, min_of(key + FA_BK, keys.end))) continue;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      load_pairs<FA_D, FA_BK>(
          k_memory, key_rows(k, key_strides(k_strides), sequence, head / FA_GROUP, key, seen_by_rows), thread_index);
      load_pairs<FA_DV, FA_BK>(
          v_memory, key_rows(v, key_strides(v_strides), sequence, head / FA_GROUP, key, seen_by_rows), thread_index);

      for (int first = rows.begin; first < rows.end; first += FA_BQ) {
        if (!sees(visible_keys_of_rows(sequence.rule, first, min_of(first + FA_BQ, rows.end)), key, key + FA_BK)) continue;
        const int begin = first + first_tile;
        const int end = min_of(begin + fragment_size, rows.end);
        const SeenKeys seen = seen_keys(sequence.rule, begin * FA_GROUP, end * FA_GROUP);
        const int query = min_of(begin + place.row, rows.end - 1);
        const int row_in_slot = sequence.q.begin + query;
        const ScoreRow score_row =
            score_row_of(params, sequence, {query, head}, alibi_slopes, attn_mask_shape, attn_mask_strides);
        const long statistics = lse_offset(params, batch, row_in_slot, head);
        const float row_lse = begin + place.row < end ? lse_log2(lse[statistics], score_row.keys) : infinity;
        const GradientRow row = gradient_row(score_row, row_lse, delta[statistics]);

        Tile<dim_tiles, FA_T> Q;
        load_row(Q, q + query_strides(q_strides).offset(batch, row_in_slot, head), dim, FA_D, place);
        Tile<value_tiles, FA_T> dO;
        load_row(dO, dout + query_strides(dout_strides).offset(batch, row_in_slot, head), value_dim, FA_DV, place);

        threadgroup_barrier(mem_flags::mem_threadgroup);  // K and V are there; parts are free
        Tile<key_tiles> S;
        S.fill(0.0f);
        Tile<key_tiles> dP;
        dP.fill(0.0f);
        multiply_by_keys(S, dP, Q, dO, k_memory + 2 * dim, v_memory + 2 * value_dim, key, seen.some, place);
        add_parts(S, dP, parts, simdgroup, lane);

        const auto dropout = dropout_of(params, row.score, key + place.column, dropout_key);
        FA_UNROLL
        for (short j = 0; j < key_tiles; ++j) {
          const int tile_key = key + j * fragment_size;
          if (!sees(seen.some, tile_key, tile_key + fragment_size)) continue;
          const bool every = contains(seen.every, tile_key, tile_key + fragment_size) && end - begin == fragment_size;
          dM.fragment[j] +=
              score_gradient(S.fragment[j], dP.fragment[j], row, tile_key + place.column, every, scale, dropout, attn_mask).ds;
        }
      }
    }
  }
}

if (mask_keys == 1) add_columns(dM);
if (mask_rows == 1) add_rows(dM, sums, simdgroup, place);
const int first_row = row_block * FA_BQ + first_tile + place.row;
const int first_key = key_block * FA_BK + place.column;
device float* const row = dmask + ((long(mask_batch) * mask_heads + mask_head) * mask_rows + first_row) * mask_keys;
if (part == 0 && first_row < mask_rows) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      const int key = first_key + j * fragment_size + i;
      if (key < mask_keys) row[key] = dM.fragment[j][i];
    }
  }
}
