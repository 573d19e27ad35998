// O += P V of a few query rows, a few keys at a time.
#pragma once

#include "cpu/few_rows.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Head-dim vectors of a tile of O.
constexpr int value_vectors = many_registers ? 4 : 2;

// A tile of O in registers: M rows by W vectors of dims from `o` on.
template <int M, int W>
struct OutputTile {
  Vec acc[M][W];

  FA_INLINE OutputTile(const float* o, std::int64_t o_stride, const float* rescale) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[m][w] = load(o + m * o_stride + w * lanes);
    }
    if (rescale == nullptr) return;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[m][w] *= rescale[m];
    }
  }
  FA_INLINE void add(Part bias) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[m][w] += splat(bias[m]);
    }
  }
  FA_INLINE void write(float* o, std::int64_t o_stride) const {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) store(o + m * o_stride + w * lanes, acc[m][w]);
    }
  }
};

// visit(key) for keys 0, step, .. : without a loop where all are there.
template <int all, int step, class Visit>
FA_INLINE void for_each_key(int keys, Visit visit) {
  if (keys == all) {
#pragma GCC unroll 8
    for (int key = 0; key < all; key += step) visit(key);
  } else {
    for (int key = 0; key < keys; key += step) visit(key);
  }
}

// o[row][d] = rescale[row] * o[row][d] + sum over keys of p[key][row] * V_key[d], for W vectors of dims.
template <DType dtype, int M, int W, class Later>
FA_INLINE void add_values_tile(const KeyRow<dtype>* values, Later later, int keys, const float* p, std::int64_t p_stride,
                               const float* rescale, std::int64_t d, int tail, float* o, std::int64_t o_stride) {
  OutputTile<M, W> tile(o + d, o_stride, rescale);
  Part bias = {};  // of each row's sum; the dims of a tile lie in one group of codes
  for_each_key<Later::rows, 1>(
      keys, [&](int key) __attribute__((always_inline)) {
        Vec v[W];
        const auto row = values[key].from(d);
        unroll<W>([&](auto w) {
          if constexpr (paired_dims<dtype>(W * lanes) > 0) {
            v[w] = row.template load_pair<w % 2>(w / 2 * 2 * lanes);
          } else if constexpr (KeyRow<dtype>::has_tail) {
            v[w] = tail > 0 ? row.load_tail(0, tail) : row.load(w * lanes);
          } else {
            v[w] = row.load(w * lanes);
          }
        });
        for (int byte = 0; byte < row_bytes<dtype>(W * lanes); byte += cache_line) {
          later.from(key).template ask<1>(values + key, row_bytes<dtype>(d) + byte);
        }
        const float factor = values[key].factor_from(d);
        if constexpr (KeyRow<dtype>::has_bias) bias += load_part(p + key * p_stride) * values[key].bias_from(d);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const Vec weight = splat(p[key * p_stride + m] * factor);
#pragma GCC unroll 4
          for (int w = 0; w < W; ++w) tile.acc[m][w] += weight * v[w];
        }
      });
  if constexpr (KeyRow<dtype>::has_bias) tile.add(bias);
  tile.write(o + d, o_stride);
}

// words[pair][row]: p of two neighbouring keys, in bfloat16; 0 for a key after the last. Reads `lanes` rows.
template <int M>
FA_INLINE void pair_weights(const float* p, std::int64_t p_stride, int keys, float* words) {
  for (int key = 0; key < keys; key += 2) {
    const Vec neighbours[2] = {load(p + key * p_stride), key + 1 < keys ? load(p + (key + 1) * p_stride) : Vec{}};
    const Vec of_rows = Bfloat16Operand::word(neighbours);
    std::memcpy(words + key / 2 * M, &of_rows, M * sizeof(float));
  }
}

// As add_values_tile, two keys at once.
template <DType dtype, int M, int W, class Later>
FA_INLINE void add_value_pairs_tile(const KeyRow<dtype>* values, Later later, int keys, const float* words,
                                    const float* rescale, std::int64_t d, float* o, std::int64_t o_stride) {
  OutputTile<M, W> tile(o + d, o_stride, rescale);
  for_each_key<Later::rows, 2>(
      keys, [&](int key) __attribute__((always_inline)) {
        Vec v[W];
        const auto first = values[key].from(d);
        const auto second = key + 1 < keys ? values[key + 1].from(d) : KeyRow<dtype>::zeros();
#pragma GCC unroll 2
        for (int w = 0; w < W; w += 2) {
          const Vec a = first.load_words(w * lanes);
          const Vec b = second.load_words(w * lanes);
          v[w] = Bfloat16Operand::word_of_rows<0>(a, b);
          v[w + 1] = Bfloat16Operand::word_of_rows<1>(a, b);
          later.from(key).template ask<2>(values + key, row_bytes<dtype>(d + w * lanes));
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const Vec weight = splat(words[key / 2 * M + m]);
#pragma GCC unroll 4
          for (int w = 0; w < W; ++w) tile.acc[m][w] = Bfloat16Operand::multiply_add(tile.acc[m][w], v[w], weight);
        }
      });
  tile.write(o + d, o_stride);
}

template <DType dtype, int M, class Later>
inline FA_INLINE_IF_FAST void add_values(const KeyRow<dtype>* values, Later later, int keys, const float* p,
                                         std::int64_t p_stride, const float* rescale, int dim, float* o,
                                         std::int64_t o_stride) {
  int d = 0;
  if constexpr (multiplies_pairs<dtype>) {
    float words[Later::rows / 2 * M];
    pair_weights<M>(p, p_stride, keys, words);
    for (; d + value_vectors * lanes <= dim; d += value_vectors * lanes) {
      add_value_pairs_tile<dtype, M, value_vectors>(values, later, keys, words, rescale, d, o, o_stride);
    }
    for (; d < paired_dims<dtype>(dim); d += 2 * lanes) {
      add_value_pairs_tile<dtype, M, 2>(values, later, keys, words, rescale, d, o, o_stride);
    }
  } else {
    for (; d + value_vectors * lanes <= dim; d += value_vectors * lanes) {
      add_values_tile<dtype, M, value_vectors>(values, later, keys, p, p_stride, rescale, d, 0, o, o_stride);
    }
    for (; d < paired_dims<dtype>(dim); d += 2 * lanes) {
      add_values_tile<dtype, M, 2>(values, later, keys, p, p_stride, rescale, d, 0, o, o_stride);
    }
  }
  for (; d < dim; d += lanes) {
    add_values_tile<dtype, M, 1>(values, later, keys, p, p_stride, rescale, d, d + lanes <= dim ? 0 : dim - d, o, o_stride);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
