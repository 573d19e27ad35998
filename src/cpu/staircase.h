// The edge of what is visible, in steps of a few rows: products leave out rows that see none of a few keys, and keys that none
// of a few rows sees.
#pragma once

#include "cpu/products.h"
#include "cpu/score_steps.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

struct RowSpan {
  int begin;
  int end;
};

// Of a tile of keys and the rows of up to four panels.
struct Staircase {
  int granules = 0;
  // Keys that one of a few rows sees, counted from the tile's first; begin >= end: none.
  KeyRange seen[4 * panel_rows / row_granule];

  void add(const RowPanel& panel, std::int32_t key_begin, int keys) {
    for (int i = 0; i < panel.width() / row_granule; ++i) {
      const KeyRange& some = panel.some_of_granule[i];
      seen[granules++] = {clamp_to(some.begin, key_begin, key_begin + keys) - key_begin,
                          clamp_to(some.end, key_begin, key_begin + keys) - key_begin};
    }
  }

  // Keys that one of the rows [row, row + count) may see.
  KeyRange keys_of_rows(int row, int count) const {
    KeyRange keys = {highest_int, 0};
    for (int i = row / row_granule; i <= (row + count - 1) / row_granule && i < granules; ++i) {
      keys = {min_of(keys.begin, seen[i].begin), max_of(keys.end, seen[i].end)};
    }
    return keys.begin < keys.end ? keys : KeyRange{0, 0};
  }

  // Rows that may see one of the keys [key, key + count).
  RowSpan rows_of_keys(int key, int count) const { return rows_of_keys(key, count, {0, granules * row_granule}); }
  RowSpan rows_of_keys(int key, int count, RowSpan among) const {
    const auto sees = [&](int i) { return seen[i].begin < seen[i].end && seen[i].end > key && seen[i].begin < key + count; };
    int first = among.begin / row_granule;
    int last = among.end / row_granule;
    while (first < last && !sees(first)) ++first;
    while (first < last && !sees(last - 1)) --last;
    return {first * row_granule, last * row_granule};
  }
};

// visit(key, first, W as a constant) for M keys at a time of a range: vectors [first, first + W) of a panel's N have rows that
// see some of them. The panel's first row is `first_row` of the staircase.
template <int M, int N, class Visit>
FA_INLINE void for_each_seen_tile(KeyRange keys, const Staircase& steps, int first_row, const Visit& visit) {
  for (int key = keys.begin; key < keys.end; key += M) {
    const RowSpan rows = steps.rows_of_keys(key, M, {first_row, first_row + N * lanes});
    const int first = (rows.begin - first_row) / lanes;
    const int count = (rows.end - first_row + lanes - 1) / lanes - first;
    unroll<N + 1>([&](auto fewer) {
      if (count == N - fewer) visit(key, first, Constant<N - fewer>{});
    });
  }
}

// Rows [M][stride] of N vectors, but for [first, first + count).
template <int M, int N>
FA_INLINE void clear_unseen(float* tile, std::int64_t stride, int first, int count) {
  if (count == N) return;
  for (int n = 0; n < N; ++n) {
    if (n >= first && n < first + count) continue;
    for (int m = 0; m < M; ++m) store(tile + m * stride + n * lanes, Vec{});
  }
}

// S^T [keys][stride] = scale K [keys][dim words] Q^T [dim words][N vectors] of a range of keys, for a panel whose first row is
// `first_row` of the staircase. 0 where a tile leaves vectors out: what none of their rows sees is masked after.
template <class Operand, int N, class Beside = NothingBeside>
inline void staircase_scores(const float* k, int dim_words, const float* q_transposed, KeyRange keys, float scale,
                             const Staircase& steps, float* scores, std::int64_t stride, int first_row = 0,
                             Beside&& beside = {}) {
  constexpr int M = score_keys<N>;
  // Out of line, so that the loop of a tile has all registers.
  const auto visit = [&](int key, int first, auto count) __attribute__((noinline)) {
    float* tile = scores + key * stride;
    if constexpr (count > 0) {
      score_tile<Operand, M, count>(k + std::int64_t{key} * dim_words, dim_words, q_transposed + first * lanes, N * lanes,
                                    scale, tile + first * lanes, stride, beside);
    }
    clear_unseen<M, N>(tile, stride, first, count);
  };
  for_each_seen_tile<M, N>(keys, steps, first_row, visit);
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
