// The splits of decode become one result: out = sum over splits of 2^(lse - max) O, over the sum of the weights.
//
// A simdgroup has one row of one head, whose splits it adds up in order. A split that saw nothing has an LSE of -inf, and its O is
// not read. A sink has joined the first split. Grid: rows of all heads, a simdgroup each.
#pragma once

#include "metal/scores.metal"
#include "metal/tile.metal"
#include "metal/unused_rows.metal"

namespace flash_attn {

FA_CONSTANT int lane_dims = (FA_DV + 31) / 32;  // head dims of a lane, 32 apart

}  // namespace flash_attn

FA_BODY
using namespace flash_attn;
const int heads = params[param_heads_q];
const int rows = query_rows(params);
const int splits = params[param_splits];
const int item = int(threadgroup_position_in_grid.x) * FA_SIMDGROUPS + int(simdgroup_index_in_threadgroup);
if (item >= rows * heads) return;
const int lane = int(thread_index_in_simdgroup);
const int row = item / heads;
const int head = item % heads;
#ifdef FA_VARLEN
const long lse_of_row = lse_offset(params, 0, row, head);
#else
const int seqlen = params[param_max_seqlen_q];
const long lse_of_row = lse_offset(params, row / seqlen, row % seqlen, head);
#endif
const long items = long(rows) * heads;

float highest = lowest_score;
for (int split = lane; split < splits; split += 32) highest = max(highest, lse_partial[split * items + lse_of_row]);
highest = simd_max(highest);

float total = 0.0f;
float sums[lane_dims] = {};
for (int split = 0; split < splits; ++split) {
  const float weight = fast::exp2((lse_partial[split * items + lse_of_row] - highest) * log2_e);
  if (weight == 0.0f) continue;
  total += weight;
  const device float* o = out_partial + (split * items + item) * FA_DV;
  FA_UNROLL
  for (short i = 0; i < lane_dims; ++i) {
    const int dim = i * 32 + lane;
    if (dim < FA_DV) sums[i] += weight * o[dim];
  }
}

const float scale = total == 0.0f ? 0.0f : 1.0f / total;
device FA_T* const result = out + long(item) * FA_DV;
FA_UNROLL
for (short i = 0; i < lane_dims; ++i) {
  const int dim = i * 32 + lane;
  if (dim < FA_DV) result[dim] = FA_T(sums[i] * scale);
}
if (lane == 0) lse[lse_of_row] = total == 0.0f ? minus_infinity : highest + log2(total) * ln_2;
