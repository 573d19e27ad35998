// What the two products of attention for a few query rows share. They read K and V where they lie: head dims in the lanes,
// every row of K and V loaded once for up to `tile_rows` query rows. With every line that they read they ask for one of
// `ahead`, the rows that are read later.
#pragma once

#include "cpu/key_row.h"
#include "cpu/matrix_tiles.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int tile_rows = 4;
// Keys that are walked side by side: whole tiles of dots for every number of rows, and whole pairs.
constexpr int walk_keys = 6;

// How far ahead in each row memory is asked for a line, and into which cache (docs/performance.md).
#if FA_BFLOAT16_TILES  // Intel, whose L1 is larger
constexpr int bytes_ahead = 1024;
constexpr int cache_ahead = 3;  // L1
#else
constexpr int bytes_ahead = 4096;
constexpr int cache_ahead = 2;  // L2
#endif

FA_INLINE void ask_for(const char* line) { __builtin_prefetch(line, 0, cache_ahead); }

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
