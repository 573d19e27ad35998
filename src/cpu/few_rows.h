// What the two products of attention for a few query rows share. They read K and V where they lie, head dims in the lanes (but
// for K in code_products.h), once for up to `tile_rows` query rows. With every line that they read they ask for one that is
// read later.
#pragma once

#include <type_traits>

#include "cpu/key_row.h"
#include "cpu/operand.h"

#if !defined(FA_TWO_STREAMS)  // 1: from memory the level's processors read two streams faster than four
#define FA_TWO_STREAMS 0
#endif

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int tile_rows = 4;
constexpr int max_rows_of_step = 32;
constexpr int max_decode_block = 192;  // keys

// How keys are walked: so many streams side by side, whole tiles of dots for every number of rows and whole pairs, each through
// a stretch of keys of its own, `depth` of them a step. And what is read so many bytes of a stream after them: a row for each,
// whose lines are asked for meanwhile (docs/performance.md).
template <int streams, bool into_l1, int keys_of_stream = 1, int ahead = into_l1 ? 8192 / streams : 4096>
struct RowsLater {
  static constexpr int depth = keys_of_stream;
  static constexpr int rows = streams * depth;                                             // of a step
  static constexpr int bytes_ahead = ahead / depth;                                        // of each row
  static constexpr int keys_of_block = into_l1 ? max_decode_block : max_decode_block / 2;  // its P stays in L1

  // Whether what comes into L2 is asked for once more, for L1, so many bytes before it is read. Codes of a byte or less have no
  // time for that, and several keys of a stream no need: they wait for arithmetic.
  template <DType dtype>
  static constexpr bool asks_twice = !into_l1 && row_bytes<dtype>(1) > 1 && depth == 1;
  static constexpr int bytes_near = 512;

  static_assert(rows <= max_rows_of_step);
  using FourKeys = RowsLater<streams, into_l1, 4, ahead>;

  static int steps(int keys) { return (keys + rows - 1) / rows; }
  // Which key of a block of so many steps a row of a step is.
  static FA_INLINE int key_of(int row, int step, int steps) { return (row / depth * steps + step) * depth + row % depth; }

  const char* const* first;
  std::int64_t offset;

  FA_INLINE RowsLater from(int row) const { return {first + row, offset}; }
  // A line of each of the first `count` rows.
  template <int count>
  FA_INLINE void ask(std::int64_t byte) const {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) __builtin_prefetch(first[i] + (offset + byte), 0, into_l1 ? 3 : 2);
  }
  // The same while `rows` are read at that byte.
  template <int count, DType dtype>
  FA_INLINE void ask(const KeyRow<dtype>* rows, std::int64_t byte) const {
    ask<count>(byte);
    if constexpr (asks_twice<dtype>) {
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) rows[i].ask(byte + bytes_near);
    }
  }
};

// In a large L1 rows of few keys have room, though they share its sets where they lie a page of memory apart; but few registers
// hold tiles of three keys, and wait for arithmetic. What comes into a small L1 pushes out queries and outputs in use, so there
// it is asked for L2, and earlier; but tiles of few registers wait longer for what lies in L2.
using StreamsIntoL1 = RowsLater<many_registers ? 4 : 6, true>;
using StreamsIntoL2 = std::conditional_t<many_registers, RowsLater<6, false>, StreamsIntoL1>;
using TwoStreamsIntoL1 = RowsLater<2, true>;

// Where P of a step's keys lies, of each row.
template <class Word, class Later>
struct StepWeights {
  const Word* of_key[Later::rows];
  int keys;
  int found = -1;  // step

  // p [key][row] of a block.
  FA_INLINE void find(const Word* p, std::int64_t stride, int keys_of_block, int step) {
    if (step == found) return;
    found = step;
    keys = 0;
    for (int row = 0; row < Later::rows; ++row) {
      const int key = Later::key_of(row, step, Later::steps(keys_of_block));
      of_key[row] = p + key * stride;
      keys += key < keys_of_block;
    }
  }
};

FA_INLINE Part load_part(const float* p) {
  Part x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// The kernel for `rows` rows, tile by tile: visit(row, M as a constant).
template <int most = tile_rows, class Visit>
FA_INLINE void for_each_row_tile(int rows, Visit visit) {
  int row = 0;
  for (; row + most <= rows; row += most) visit(row, Constant<most>{});
  unroll<most, 1>([&](auto rest) FA_INLINE_IF_FAST {
    if (rows - row == rest) visit(row, rest);
  });
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
