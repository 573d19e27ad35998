// The matrix products of attention, each a loop over register tiles.
#pragma once

#include <type_traits>

#include "cpu/matrix_tiles.h"
#include "cpu/pack.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

inline void scale_row(float* row, float scale, int dims) {
  for (int d = 0; d < dims; d += lanes) store(row + d, load(row + d) * scale);
}

// rows[i][d] = columns[d][i] of the first `lanes` rows of a matrix whose columns lie `stride` apart; the last columns, up to a
// whole vector, exist.
inline void read_transposed(const float* columns, std::int64_t stride, int count, float (&rows)[lanes][padded_head_dim]) {
  for (int d = 0; d < count; d += lanes) {
    const float* some[lanes];
    for (int i = 0; i < lanes; ++i) some[i] = columns + std::int64_t{d + i} * stride;
    visit_columns(some, lanes, [&](int row, Vec values) { store(rows[row] + d, values); });
  }
}

constexpr int rounds_a_step = 4;  // of a tile, for each step of what goes on beside it

// The register tile: acc[M][N vectors] += A[M][depth] * B[depth][N vectors]. Elements of A are broadcast, B is read along its
// lanes; M * N accumulators, N vectors of B and one broadcast fill the register file. Between rounds those of B are free for
// beside.step().
template <class Operand, int M, int N, class Beside = NothingBeside>
FA_INLINE void matmul_tile(Vec (&acc)[M][N], const float* a, std::int64_t a_row, std::int64_t a_depth, const float* b,
                           std::int64_t b_depth, int depth, Beside&& beside = {}) {
  const auto round = [&]() FA_INLINE_IF_FAST {
    Vec row[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) row[n] = load(b + n * lanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec element = splat(a[m * a_row]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[m][n] = Operand::multiply_add(acc[m][n], element, row[n]);
    }
    a += a_depth;
    b += b_depth;
  };
  // Unrolled, so that the processor foresees the end of the loop.
  if constexpr (!std::is_base_of_v<NothingBeside, std::remove_reference_t<Beside>>) {
    for (; depth >= rounds_a_step; depth -= rounds_a_step) {
      unroll<rounds_a_step>([&](auto) FA_INLINE_IF_FAST { round(); });
      beside.step();
    }
#pragma GCC unroll 1
    for (; depth > 0; --depth) round();
  } else {
    // Where a round could not end the loop GCC would mix it with the next one, which takes registers that few levels have.
#pragma GCC unroll 4
    for (; depth > 0; --depth) round();
  }
}

// A tile [keys][stride] as a left operand over keys: words of neighbouring keys, [key words][stride]; in place allowed. float32
// needs no other form.
template <class Operand>
inline const float* pack_along_keys(const float* tile, std::int64_t stride, int keys, float* packed) {
  if constexpr (Operand::per_word == 1) return tile;
  for (int word = 0; word < words<Operand>(keys); ++word) {
    for (int column = 0; column < stride; column += lanes) {
      Vec neighbours[Operand::per_word] = {};
      for (int i = 0; i < Operand::per_word && word * Operand::per_word + i < keys; ++i) {
        neighbours[i] = load(tile + (word * Operand::per_word + i) * stride + column);
      }
      store(packed + word * stride + column, Operand::word(neighbours));
    }
  }
  return packed;
}

// S^T [M keys][N vectors of a row] = scale K [M][dim words] Q^T [dim words][q_stride].
template <class Operand, int M, int N, class Beside>
FA_INLINE void score_tile(const float* k, int dim_words, const float* q_transposed, std::int64_t q_stride, float scale,
                          float* scores, std::int64_t stride, Beside& beside) {
  Vec acc[M][N] = {};
  matmul_tile<Operand, M, N>(acc, k, dim_words, 1, q_transposed, q_stride, dim_words, beside);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(scores + m * stride + n * lanes, acc[m][n] * scale);
  }
}

// panel_product for panels [begin, end), W of whose vectors count.
template <class Operand, int M, int W, class DepthOf>
inline void product_of_panels(int begin, int end, const float* a, std::int64_t a_row, std::int64_t a_depth, const float* b,
                              std::int64_t b_panel_stride, int rows, float* c, std::int64_t c_panel_stride, DepthOf depth_of) {
  for (int panel = begin; panel < end; ++panel) {
    for (int row = 0; row < rows; row += M) {
      const KeyRange depth = depth_of(row);
      float* tile = c + panel * c_panel_stride + std::int64_t{row} * dim_panel;
      Vec acc[M][W] = {};
      matmul_tile<Operand, M, W>(acc, a + row * a_row + depth.begin * a_depth, a_row, a_depth,
                                 b + panel * b_panel_stride + std::int64_t{depth.begin} * dim_panel, dim_panel,
                                 depth.end - depth.begin);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < W; ++n) {
          float* p = tile + m * dim_panel + n * lanes;
          store(p, load(p) + acc[m][n]);
        }
      }
    }
  }
}

// C [rows][dims] += A B, where A(row, k) = a[row * a_row + k * a_depth] and B [dim panels][k][dim_panel], k in words; C is
// panels too: [dim panels][rows][dim_panel]. `rows` is a multiple of M: dV += P^T dO, dK += dS^T Q and dQ += dS K. Of the depth
// only depth_of(row) counts for the M rows from `row` on: outside of it A is 0.
template <class Operand, int M, class DepthOf>
inline void panel_product(const float* a, std::int64_t a_row, std::int64_t a_depth, const float* b, std::int64_t b_panel_stride,
                          int rows, int dims, float* c, std::int64_t c_panel_stride, DepthOf depth_of) {
  for_each_width_of_panels(dims, [&](int begin, int end, auto width) {
    product_of_panels<Operand, M, width>(begin, end, a, a_row, a_depth, b, b_panel_stride, rows, c, c_panel_stride, depth_of);
  });
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
