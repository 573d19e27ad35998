// What the two products of attention for a few query rows share. They read K and V where they lie: head dims in the lanes,
// every row of K and V loaded once for up to `tile_rows` query rows. With every line that they read they ask for one that is
// read later.
#pragma once

#include "cpu/key_row.h"
#include "cpu/matrix_tiles.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int tile_rows = 4;
constexpr int max_streams = 6;

// What is read some way after the rows of `streams` keys, a row for each of them, whose lines are asked for meanwhile. What
// comes into a small L1 pushes out queries and outputs in use, so there it is asked for L2, and earlier. Into a large one too,
// if there are many: rows that lie a page of memory apart share its sets (docs/performance.md).
template <bool large_l1>
struct RowsLater {
  static constexpr bool has_large_l1 = large_l1;
  static constexpr int streams = large_l1 ? 4 : 6;  // whole tiles of dots for every number of rows, and whole pairs
  static constexpr int bytes_ahead = large_l1 ? 2048 : 4096;

  const char* const* first;

  FA_INLINE RowsLater from(int key) const { return {first + key}; }
  // A line of each of the first `count` rows.
  template <int count>
  FA_INLINE void ask(std::int64_t byte) const {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) __builtin_prefetch(first[i] + byte, 0, large_l1 ? 3 : 2);
  }
};

// The kernel for `rows` rows, tile by tile: visit(row, M as a constant).
template <class Visit>
FA_INLINE void for_each_row_tile(int rows, Visit visit) {
  int row = 0;
  for (; row + tile_rows <= rows; row += tile_rows) visit(row, Constant<tile_rows>{});
  switch (rows - row) {
    case 3:
      return visit(row, Constant<3>{});
    case 2:
      return visit(row, Constant<2>{});
    case 1:
      return visit(row, Constant<1>{});
    default:
      return;
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
