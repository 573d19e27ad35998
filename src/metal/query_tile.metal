// Eight query rows in registers against a block of keys in threadgroup memory: how dQ and the gradient of attn_mask see scores.
#pragma once

#include "metal/gradient_tile.metal"
#include "metal/row_block.metal"

namespace flash_attn {

static_assert(FA_BQ * FA_SPLIT_D == FA_SIMDGROUPS * fragment_size, "a simdgroup has eight rows");
#ifdef FA_DROPOUT
static_assert(FA_BK <= 32, "one call of Philox serves a block");
#endif

FA_CONSTANT int key_tiles = FA_BK / fragment_size;
FA_CONSTANT int parts_size = FA_SPLIT_D > 1 ? FA_SIMDGROUPS * key_tiles * part_size : 1;

/// A B^T of eight rows in registers and eight that are stored in pairs.
template <int columns>
FA_FN Fragment<float> product_abt(
    thread const Tile<columns, FA_T>& a, ConstStoredRows b, int pitch_of_b, LanePlace place) {
  const ConstStoredRows pairs = b + place.column / 2 * pitch_of_b + 2 * place.row;
  Fragment<float> sum = Fragment<float>(0.0f);
  FA_UNROLL
  for (short d = 0; d < columns; ++d) {
    const ConstStoredRows pair = pairs + 2 * d * fragment_size;
    multiply_accumulate(sum, a.fragment[d], Fragment<FA_T>(pair[0], pair[1]));
  }
  return sum;
}

/// q.k and dP of the keys from `key` on, tile by tile; those that hold no key of `seen` stay 0.
FA_FN void multiply_by_keys(
    thread Tile<key_tiles>& dot, thread Tile<key_tiles>& dp, thread const Tile<dim_tiles, FA_T>& q,
    thread const Tile<value_tiles, FA_T>& dout, ConstStoredRows k, ConstStoredRows v, int key, KeyRange seen, LanePlace place) {
  FA_UNROLL
  for (short j = 0; j < key_tiles; ++j) {
    const int first = j * fragment_size;
    if (!sees(seen, key + first, key + first + fragment_size)) continue;
    dot.fragment[j] = product_abt(q, k + first / 2 * pair_pitch, pair_pitch, place);
    dp.fragment[j] = product_abt(dout, v + first / 2 * value_pair_pitch, value_pair_pitch, place);
  }
}

}  // namespace flash_attn
