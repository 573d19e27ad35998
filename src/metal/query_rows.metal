// Eight query rows, or a part of their head dims, between memory and registers.
#pragma once

#include "metal/key_block.metal"

namespace flash_attn {

/// Head dims from dim_begin on of one row; zeros past the last.
template <int columns, class Pointer>
FA_FN void load_query(thread Tile<columns, FA_T>& q, Pointer row, int dim_begin, int dims, LanePlace place) {
  FA_UNROLL
  for (short d = 0; d < columns; ++d) {
    const int dim = dim_begin + d * fragment_size + place.column;
    q.fragment[d] = Fragment<FA_T>(dim < dims ? row[dim] : FA_T(0.0f), dim + 1 < dims ? row[dim + 1] : FA_T(0.0f));
  }
}

/// Head dims from dim_begin on of one row.
template <class Pointer>
FA_FN void store_output(Pointer row, thread const Tile<value_tiles>& o, int dim_begin, LanePlace place) {
  FA_UNROLL
  for (short d = 0; d < value_tiles; ++d) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      const int dim = dim_begin + d * fragment_size + place.column + i;
      if (dim < FA_DV) row[dim] = FA_T(o.fragment[d][i]);
    }
  }
}

}  // namespace flash_attn
