// The two products of attention for a few query rows, which read K and V where they lie: head dims in the lanes, every row of
// K and V loaded once for up to `tile_rows` query rows. With every line that they read they ask for one of `ahead`, the rows
// that are read later.
#pragma once

#include "cpu/key_row.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int tile_rows = 4;

// Keys of a tile of M rows: M * dot_keys accumulators and as many vectors of K leave a register for Q.
template <int M>
constexpr int dot_keys = many_registers || M < 3 ? 6 : 3;
// Head-dim vectors of a tile of O.
constexpr int value_vectors = many_registers ? 4 : 2;

// Sums of the lanes of four vectors.
FA_INLINE void sum_lanes(Vec a, Vec b, Vec c, Vec d, float* sums) {
  // Neighbouring lanes of a 128-bit part first: [a0 + a2, b0 + b2, a1 + a3, b1 + b3] of each part.
  const auto pairs = [](Vec x, Vec y) { return unpack_low(x, y) + unpack_high(x, y); };
  const Part total = sum_of_parts(pairs(pairs(a, c), pairs(b, d)));
  __builtin_memcpy(sums, &total, sizeof(total));
}

// acc[key][row] += K_key . Q_row, a vector of partial sums. q [M][q_stride], zeros after the last dim.
template <DType dtype, int K, int M>
FA_INLINE void add_dots(const KeyRow<dtype>* keys, const char* const* ahead, const float* q, std::int64_t q_stride, int dim,
                        Vec (&acc)[K][M]) {
  const auto add = [&](int d, const Vec(&k)[K]) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec row = load(q + m * q_stride + d);
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) acc[i][m] += k[i] * row;
    }
  };
  Vec k[K];
  int d = 0;
  if constexpr (paired_dims<dtype>(2 * lanes) > 0) {
    for (; d < paired_dims<dtype>(dim); d += 2 * lanes) {
      unroll<2>([&](auto odd) {
#pragma GCC unroll 8
        for (int i = 0; i < K; ++i) {
          k[i] = keys[i].template load_pair<odd>(d);
          if (!odd) __builtin_prefetch(ahead[i] + row_bytes<dtype>(d));
        }
        add(d + odd * lanes, k);
      });
    }
  }
  for (; d + lanes <= dim; d += lanes) {
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      k[i] = keys[i].load(d);
      __builtin_prefetch(ahead[i] + row_bytes<dtype>(d));
    }
    add(d, k);
  }
  if constexpr (KeyRow<dtype>::has_tail) {
    if (d == dim) return;
    for (int i = 0; i < K; ++i) k[i] = keys[i].load_tail(d, dim - d);
    add(d, k);
  }
}

// scores[key * stride + row] = scale * K_key . Q_row, or added to what is there.
template <DType dtype, int K, int M>
FA_INLINE void dots_tile(const KeyRow<dtype>* keys, const char* const* ahead, const float* q, std::int64_t q_stride, int dim,
                         float scale, bool add, float* scores, std::int64_t stride) {
  constexpr int count = K * M;
  Vec acc[K][M] = {};
  add_dots<dtype, K, M>(keys, ahead, q, q_stride, dim, acc);
  float sums[(count + 3) / 4 * 4];
#pragma GCC unroll 8
  for (int i = 0; i < count; i += 4) {
    const auto at = [&](int j) { return j < count ? acc[j / M][j % M] : Vec{}; };
    sum_lanes(at(i), at(i + 1), at(i + 2), at(i + 3), sums + i);
  }
#pragma GCC unroll 8
  for (int key = 0; key < K; ++key) {
    const float factor = scale * keys[key].factor();
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      float& score = scores[key * stride + m];
      score = sums[key * M + m] * factor + (add ? score : 0.0f);
    }
  }
}

// Keys that are walked side by side: whole tiles for every M.
constexpr int walk_keys = 6;

template <DType dtype, int M>
inline void dots(const KeyRow<dtype>* keys, const char* const* ahead, const float* q, std::int64_t q_stride, int dim,
                 float scale, bool add, float* scores, std::int64_t stride) {
  for (int key = 0; key < walk_keys; key += dot_keys<M>) {
    dots_tile<dtype, dot_keys<M>, M>(keys + key, ahead + key, q, q_stride, dim, scale, add, scores + key * stride, stride);
  }
}

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

// o[row][d] = rescale[row] * o[row][d] + sum over keys of p[key][row] * V_key[d], for W vectors of dims.
template <DType dtype, int M, int W>
FA_INLINE void add_values_tile(const KeyRow<dtype>* values, const char* const* ahead, int keys, const float* p,
                               std::int64_t p_stride, const float* rescale, int d, int tail, float* o, std::int64_t o_stride) {
  Vec acc[M][W];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      acc[m][w] = load(o + m * o_stride + d + w * lanes);
      if (rescale) acc[m][w] *= rescale[m];
    }
  }
  for (int key = 0; key < keys; ++key) {
    Vec v[W];
    unroll<W>([&](auto w) {
      if constexpr (paired_dims<dtype>(W * lanes) > 0) {
        v[w] = values[key].template load_pair<w % 2>(d + w / 2 * 2 * lanes);
      } else if constexpr (KeyRow<dtype>::has_tail) {
        v[w] = tail > 0 ? values[key].load_tail(d, tail) : values[key].load(d + w * lanes);
      } else {
        v[w] = values[key].load(d + w * lanes);
      }
    });
    const char* row_ahead = ahead[key] + row_bytes<dtype>(d);
    for (int byte = 0; byte < row_bytes<dtype>(W * lanes); byte += cache_line) __builtin_prefetch(row_ahead + byte);
    const float factor = values[key].factor();
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec weight = splat(p[key * p_stride + m] * factor);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[m][w] += weight * v[w];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(o + m * o_stride + d + w * lanes, acc[m][w]);
  }
}

template <DType dtype, int M>
inline void add_values(const KeyRow<dtype>* values, const char* const* ahead, int keys, const float* p, std::int64_t p_stride,
                       const float* rescale, int dim, float* o, std::int64_t o_stride) {
  int d = 0;
  for (; d + value_vectors * lanes <= dim; d += value_vectors * lanes) {
    add_values_tile<dtype, M, value_vectors>(values, ahead, keys, p, p_stride, rescale, d, 0, o, o_stride);
  }
  for (; d < paired_dims<dtype>(dim); d += 2 * lanes) {
    add_values_tile<dtype, M, 2>(values, ahead, keys, p, p_stride, rescale, d, 0, o, o_stride);
  }
  for (; d < dim; d += lanes) {
    add_values_tile<dtype, M, 1>(values, ahead, keys, p, p_stride, rescale, d, d + lanes <= dim ? 0 : dim - d, o, o_stride);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
