// The matrix products of attention, each a loop over register tiles.
#pragma once

#include "cpu/pack.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// S^T [keys][stride] = K [keys][dim] Q^T [dim][N vectors].
template <int N>
inline void score_product(const float* k, int dim, const float* q_transposed, int keys, float* scores, std::int64_t stride) {
  constexpr int M = score_keys<N>;
  for (int key = 0; key < keys; key += M) {
    Vec acc[M][N] = {};
    matmul_tile<M, N>(acc, k + std::int64_t{key} * dim, dim, 1, q_transposed, N * lanes, dim);
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) store(scores + (key + m) * stride + n * lanes, acc[m][n]);
    }
  }
}

// O [rows][dims] = alpha O + P^T [keys][rows] V [dim panels][keys][dim_panel].
template <int N>
inline void value_product(const float* p, int keys, const float* v, std::int64_t v_panel_stride, int panels_v,
                          const float* alpha, float* o) {
  constexpr int M = value_rows<N>;
  const int dims = panels_v * dim_panel;
  for (int panel = 0; panel < panels_v; ++panel) {
    for (int row = 0; row < N * lanes; row += M) {
      float* tile = o + std::int64_t{row} * dims + panel * dim_panel;
      Vec acc[M][dim_vectors];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < dim_vectors; ++n) acc[m][n] = load(tile + m * dims + n * lanes) * alpha[row + m];
      }
      matmul_tile<M, dim_vectors>(acc, p + row, 1, N * lanes, v + panel * v_panel_stride, dim_panel, keys);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < dim_vectors; ++n) store(tile + m * dims + n * lanes, acc[m][n]);
      }
    }
  }
}

// C [rows][dim panels] += A B, where A(row, k) = a[row * a_row + k * a_depth] and B [dim panels][k][dim_panel]; C is panels
// too: [dim panels][rows][dim_panel]. `rows` is a multiple of M: dV += P^T dO, dK += dS^T Q and dQ += dS K.
template <int M>
inline void panel_product(const float* a, std::int64_t a_row, std::int64_t a_depth, const float* b, std::int64_t b_panel_stride,
                          int depth, int rows, int panels, float* c, std::int64_t c_panel_stride) {
  for (int panel = 0; panel < panels; ++panel) {
    for (int row = 0; row < rows; row += M) {
      float* tile = c + panel * c_panel_stride + std::int64_t{row} * dim_panel;
      Vec acc[M][dim_vectors] = {};
      matmul_tile<M, dim_vectors>(acc, a + row * a_row, a_row, a_depth, b + panel * b_panel_stride, dim_panel, depth);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < dim_vectors; ++n) {
          float* p = tile + m * dim_panel + n * lanes;
          store(p, load(p) + acc[m][n]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
