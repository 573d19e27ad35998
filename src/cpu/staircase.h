// The edge of what is visible, in steps of a vector of rows: products leave out vectors that see none of a few keys.
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
  static constexpr int max_vectors = 4 * panel_vectors;

  int vectors = 0;
  KeyRange seen[max_vectors];  // keys that some row of each vector sees, counted from the tile's first; begin >= end: none

  void add(const RowPanel& panel, std::int32_t key_begin, int keys) {
    for (int v = 0; v < panel.vectors; ++v) {
      const KeyRange& some = panel.some_of_vector[v];
      seen[vectors++] = {clamp_to(some.begin, key_begin, key_begin + keys) - key_begin,
                         clamp_to(some.end, key_begin, key_begin + keys) - key_begin};
    }
  }

  // Keys that one of the rows [row, row + count) may see.
  KeyRange keys_of_rows(int row, int count) const {
    KeyRange keys = {highest_int, 0};
    for (int v = row / lanes; v <= (row + count - 1) / lanes && v < vectors; ++v) {
      keys = {min_of(keys.begin, seen[v].begin), max_of(keys.end, seen[v].end)};
    }
    return keys.begin < keys.end ? keys : KeyRange{0, 0};
  }

  // Rows that may see one of the keys [key, key + count), whole vectors of those from `first` on.
  RowSpan rows_of_keys(int key, int count, int first = 0) const { return rows_of_keys(key, count, first, vectors); }
  RowSpan rows_of_keys(int key, int count, int first, int last) const {
    const auto sees = [&](int v) { return seen[v].begin < seen[v].end && seen[v].end > key && seen[v].begin < key + count; };
    while (first < last && !sees(first)) ++first;
    while (first < last && !sees(last - 1)) --last;
    return {first * lanes, last * lanes};
  }
};

// S^T [keys][stride] = scale K [keys][dim words] Q^T [dim words][N vectors], of a panel whose first vector is `first_vector` of
// the staircase. 0 where a tile leaves vectors out: what none of their rows sees is masked after.
template <class Operand, int N, class Ahead = NoRowsAhead>
inline void staircase_scores(const float* k, int dim_words, const float* q_transposed, int keys, float scale,
                             const Staircase& steps, float* scores, std::int64_t stride, int first_vector = 0,
                             Ahead&& ahead = {}) {
  constexpr int M = score_keys<N>;
  for (int key = 0; key < keys; key += M) {
    const RowSpan rows = steps.rows_of_keys(key, M, first_vector, first_vector + N);
    const int first = rows.begin / lanes - first_vector;
    const int count = (rows.end - rows.begin) / lanes;
    float* tile = scores + key * stride;
    unroll<N>([&](auto fewer) {
      constexpr int W = N - fewer;
      if (count != W) return;
      score_tile<Operand, M, W>(k + std::int64_t{key} * dim_words, dim_words, q_transposed + first * lanes, N * lanes, scale,
                                tile + first * lanes, stride, ahead);
    });
    for (int n = 0; n < N; ++n) {
      if (n >= first && n < first + count) continue;
      for (int m = 0; m < M; ++m) store(tile + m * stride + n * lanes, Vec{});
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
