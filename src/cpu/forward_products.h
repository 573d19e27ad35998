// Forward's two products, S^T = K Q^T and O += P V, by vectors or by matrix tiles.
#pragma once

#include "cpu/matrix_tiles.h"
#include "cpu/online_softmax.h"
#include "cpu/pack_ahead.h"
#include "cpu/staircase.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// A panel's rows of O while a block of keys is added to them.
struct RowsOfO {
  float* sums;                // [rows][dims]
  bool are_empty;             // no block came before: sums are not read
  const ResultRows* results;  // where the rows go after the last block; null: they stay in sums
};

// O [rows][dims] += P^T [key words][rows] V [dim panels][key words][dim_panel].
template <class Operand, int N>
inline void value_product(const float* p, const float* v, std::int64_t v_panel_stride, int panels_v, const Staircase& steps,
                          const RowsOfO& o, PackAhead<Operand>& ahead) {
  constexpr int M = value_rows<N>;
  static_assert(N * lanes % M == 0, "a tile would reach past the panel");
  const int dims = panels_v * dim_panel;
  for (int panel = 0; panel < panels_v; ++panel) {
    for (int row = 0; row < N * lanes; row += M) {
      const KeyRange keys = steps.keys_of_rows(row, M);
      const int first = keys.begin / Operand::per_word;
      float* sums = o.sums + std::int64_t{row} * dims + panel * dim_panel;
      Vec acc[M][dim_vectors] = {};
      matmul_tile<Operand, M, dim_vectors>(acc, p + first * N * lanes + row, 1, N * lanes,
                                           v + panel * v_panel_stride + first * dim_panel, dim_panel,
                                           words<Operand>(keys.end) - first, ahead);
      // Only now: the product does not wait for what comes from L2.
      if (!o.are_empty) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
          for (int n = 0; n < dim_vectors; ++n) acc[m][n] += load(sums + m * dims + n * lanes);
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        if (o.results) {
          o.results->write(row + m, panel, acc[m]);
        } else {
#pragma GCC unroll 4
          for (int n = 0; n < dim_vectors; ++n) store(sums + m * dims + n * lanes, acc[m][n]);
        }
      }
    }
  }
}

template <class Operand>
struct ForwardProducts {
  struct Unit {};  // what a thread holds while it multiplies
  static constexpr bool leaves_scale = false;
  static constexpr bool leaves_results = true;                      // in their place, see RowsOfO
  static constexpr bool softmax_beside = FA_LEVEL::softmax_beside;  // see forward_scores.h

  // S^T [keys][stride] = scale K [keys][dim words] Q^T [dim words][N vectors], of a range of keys. Scores of the last tile may
  // be of keys past the end.
  template <int N>
  static FA_INLINE void scores(const float* k, int dim_words, const float* q_transposed, KeyRange keys, float scale,
                               const Staircase& steps, float* scores, std::int64_t stride, PackAhead<Operand>& ahead) {
    staircase_scores<Operand, N>(k, dim_words, q_transposed, keys, scale, steps, scores, stride, 0, ahead);
  }

  // O [rows][dims] += P V, P [keys][N vectors] of which `keys` count, V [dim panels][key words][dim_panel]; P is lost.
  template <int N>
  static FA_INLINE void values(float* p, int keys, const float* v, std::int64_t v_panel_stride, int panels_v,
                               const Staircase& steps, const RowsOfO& o, float*, PackAhead<Operand>& ahead) {
    const float* words_of_p = pack_along_keys<Operand>(p, N * lanes, keys, p);
    value_product<Operand, N>(words_of_p, v, v_panel_stride, panels_v, steps, o, ahead);
  }
};

#if FA_BFLOAT16_TILES

// P^T [rows][key words] from P [keys][N vectors], zero from `keys` to the end of the last word's tile.
template <int N>
inline void transpose_probabilities(const float* p, int keys, float* transposed, int key_words) {
  for (int first = 0; first < key_words; first += lanes) {
    for (int n = 0; n < N; ++n) {
      Vec block[lanes];
      for (int i = 0; i < lanes; ++i) {
        const int key = 2 * (first + i);
        const float* row = p + std::int64_t{key} * N * lanes + n * lanes;
        block[i] = MatrixOperand::word({key < keys ? load(row) : Vec{}, key + 1 < keys ? load(row + N * lanes) : Vec{}});
      }
      transpose(block);
      for (int i = 0; i < lanes; ++i) store(transposed + (n * lanes + i) * key_words + first, block[i]);
    }
  }
}

template <>
struct ForwardProducts<MatrixOperand> {
  using Unit = MatrixUnit;
  static constexpr bool leaves_results = false;
  static constexpr bool softmax_beside = false;
  static constexpr bool leaves_scale = true;  // tiles are stored as they are: who reads scores next scales them
  static_assert(lanes == matrix_tile && dim_panel == 2 * matrix_tile);

  template <int N>
  static inline void scores(const float* k, int dim_words, const float* q_transposed, KeyRange keys, float, const Staircase&,
                            float* scores, std::int64_t stride, PackAhead<MatrixOperand>&) {
    constexpr int M = 2;
    for (int key = keys.begin; key < keys.end; key += M * matrix_tile) {
      float* tile = scores + key * stride;
      multiply_tiles<M, N>(false, tile, stride, k + std::int64_t{key} * dim_words, dim_words, q_transposed, N * lanes,
                           dim_words / matrix_tile);
    }
  }

  template <int N>
  static inline void values(float* p, int keys, const float* v, std::int64_t v_panel_stride, int panels_v, const Staircase&,
                            const RowsOfO& rows, float* scratch, PackAhead<MatrixOperand>&) {
    float* o = rows.sums;
    const int key_words = words<MatrixOperand>(keys);
    const std::int64_t dims = std::int64_t{panels_v} * dim_panel;
    transpose_probabilities<N>(p, keys, scratch, key_words);
    if (rows.are_empty) std::memset(o, 0, sizeof(float) * static_cast<std::size_t>(N * lanes * dims));
    for (int panel = 0; panel < panels_v; ++panel) {
      multiply_tiles<N, 2>(true, o + panel * dim_panel, dims, scratch, key_words, v + panel * v_panel_stride, dim_panel,
                           key_words / matrix_tile);
    }
  }
};

using ForwardBfloat16 = MatrixOperand;
#elif FA_BFLOAT16_DOT
using ForwardBfloat16 = Bfloat16Operand;
#else
using ForwardBfloat16 = Float32Operand;
#endif

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
