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

// visit(i) for the keys 0, each, .. of a step: of few keys without a loop, where all are there, of many two at a time.
template <class Later, int each, class Visit>
FA_INLINE void for_each_key(int keys, Visit visit) {
  if constexpr (Later::depth > 1) {
#pragma GCC unroll 2
    for (int key = 0; key < keys; key += each) visit(key);
  } else if (keys == Later::rows) {
#pragma GCC unroll 8
    for (int key = 0; key < Later::rows; key += each) visit(key);
  } else {
    for (int key = 0; key < keys; key += each) visit(key);
  }
}

// Some rows of O, and what is done to them: o[row][d] = rescale[row] * o[row][d] + sum over a step's keys of P V.
template <class Later>
struct OutputRows {
  float* o;
  std::int64_t stride;
  const float* rescale;  // null: by 1
  const StepWeights<float, Later>& weights;
  int first_row;          // of the weights
  std::int64_t to_words;  // from a key's weights to the words of pair_weights

  FA_INLINE const float* weights_of(int key) const { return weights.of_key[key] + first_row; }
  FA_INLINE const float* words_of(int key) const { return weights_of(key) + to_words; }
};

// What values are multiplied by, P times their factor, and what sums of codes lack, P times their biases. With few registers
// both are made once for all dims that share them, with many, where that is slower (docs/performance.md), as they are asked
// for.
template <DType dtype, class Later>
class TileWeights {
  static constexpr bool are_made_once = !many_registers && KeyRow<dtype>::has_factor;

 public:
  static constexpr bool serves_a_group = are_made_once && KeyRow<dtype>::has_bias;  // of dims; else all

  FA_INLINE TileWeights(const KeyRow<dtype>* values, const OutputRows<Later>& rows, std::int64_t d)
      : values_(values), rows_(rows) {
    if constexpr (are_made_once) {
      for (int key = 0; key < rows.weights.keys; ++key) {
        const Part p = load_part(rows.weights_of(key));
        const Part product = p * values[key].factor_from(d);
        std::memcpy(products_[key], &product, sizeof(product));
        if constexpr (KeyRow<dtype>::has_bias) bias_ += p * values[key].bias_from(d);
      }
    }
  }

  // For row m of a key: splat(of_key(key)[m] * factor(key, d)).
  FA_INLINE const float* of_key(int key) const {
    const float* p = are_made_once ? products_[key] : rows_.weights_of(key);
    if constexpr (!many_registers && !are_made_once) pin(p);
    return p;
  }
  FA_INLINE float factor(int key, std::int64_t d) const { return are_made_once ? 1.0f : values_[key].factor_from(d); }
  // What each row lacks: all of it that was made, and a key's that was not.
  FA_INLINE Part bias() const { return bias_; }
  FA_INLINE void add_bias(int key, std::int64_t d, Part& bias) const {
    if constexpr (KeyRow<dtype>::has_bias && !are_made_once) bias += load_part(of_key(key)) * values_[key].bias_from(d);
  }

 private:
  const KeyRow<dtype>* values_;
  const OutputRows<Later>& rows_;
  float products_[are_made_once ? Later::rows : 1][tile_rows];
  Part bias_ = {};
};

// For W vectors of dims.
template <DType dtype, int M, int W, class Later>
FA_INLINE void add_values_tile(const KeyRow<dtype>* values, Later later, const OutputRows<Later>& rows,
                               const TileWeights<dtype, Later>& weights, std::int64_t d, int tail) {
  OutputTile<M, W> tile(rows.o + d, rows.stride, rows.rescale);
  Part bias = weights.bias();
  for_each_key<Later, 1>(
      rows.weights.keys, [&](int key) __attribute__((always_inline)) {
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
        const float* p = weights.of_key(key);
        const float factor = weights.factor(key, d);
        weights.add_bias(key, d, bias);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const Vec weight = splat(p[m] * factor);
#pragma GCC unroll 4
          for (int w = 0; w < W; ++w) tile.acc[m][w] += weight * v[w];
        }
      });
  if constexpr (KeyRow<dtype>::has_bias) tile.add(bias);
  tile.write(rows.o + d, rows.stride);
}

// words[key][row]: P of two neighbouring rows of a step in bfloat16, at the place of the first; 0 for a key after the last.
template <class Later>
inline void pair_weights(const float* p, std::int64_t stride, int keys, float* words) {
  const int steps = Later::steps(keys);
  for (int step = 0; step < steps; ++step) {
    for (int i = 0; i < Later::rows; i += 2) {
      const int first = Later::key_of(i, step, steps);
      const int second = Later::key_of(i + 1, step, steps);
      if (first >= keys) break;
      for (int row = 0; row < stride; row += lanes) {
        const Vec neighbours[2] = {load(p + first * stride + row), second < keys ? load(p + second * stride + row) : Vec{}};
        store(words + first * stride + row, Bfloat16Operand::word(neighbours));
      }
    }
  }
}

// As add_values_tile, two keys at once.
template <DType dtype, int M, int W, class Later>
FA_INLINE void add_value_pairs_tile(const KeyRow<dtype>* values, Later later, const OutputRows<Later>& rows, std::int64_t d) {
  OutputTile<M, W> tile(rows.o + d, rows.stride, rows.rescale);
  for_each_key<Later, 2>(
      rows.weights.keys, [&](int key) __attribute__((always_inline)) {
        Vec v[W];
        const auto first = values[key].from(d);
        const auto second = key + 1 < rows.weights.keys ? values[key + 1].from(d) : KeyRow<dtype>::zeros();
#pragma GCC unroll 2
        for (int w = 0; w < W; w += 2) {
          const Vec a = first.load_words(w * lanes);
          const Vec b = second.load_words(w * lanes);
          v[w] = Bfloat16Operand::word_of_rows<0>(a, b);
          v[w + 1] = Bfloat16Operand::word_of_rows<1>(a, b);
          later.from(key).template ask<2>(values + key, row_bytes<dtype>(d + w * lanes));
        }
        const float* words = rows.words_of(key);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const Vec weight = splat(words[m]);
#pragma GCC unroll 4
          for (int w = 0; w < W; ++w) tile.acc[m][w] = Bfloat16Operand::multiply_add(tile.acc[m][w], v[w], weight);
        }
      });
  tile.write(rows.o + d, rows.stride);
}

// For dims [d, end), which TileWeights serves.
template <DType dtype, int M, class Later>
FA_INLINE void add_values_between(const KeyRow<dtype>* values, Later later, const OutputRows<Later>& rows, int d, int end) {
  constexpr int W = value_vectors;
  const TileWeights<dtype, Later> weights(values, rows, d);
  if constexpr (!multiplies_pairs<dtype>) {
    for (; d + W * lanes <= end; d += W * lanes) add_values_tile<dtype, M, W>(values, later, rows, weights, d, 0);
  }
  if constexpr (!multiplies_pairs<dtype> && W > 2) {
    for (; d < paired_dims<dtype>(end); d += 2 * lanes) add_values_tile<dtype, M, 2>(values, later, rows, weights, d, 0);
  }
  for (; d < end; d += lanes) {
    add_values_tile<dtype, M, 1>(values, later, rows, weights, d, d + lanes <= end ? 0 : end - d);
  }
}

template <DType dtype, int M, class Later>
inline FA_INLINE_IF_FAST void add_values(const KeyRow<dtype>* values, Later later, const OutputRows<Later>& rows, int dim) {
  int d = 0;
  if constexpr (multiplies_pairs<dtype>) {
    constexpr int W = value_vectors;
    for (; d + W * lanes <= dim; d += W * lanes) add_value_pairs_tile<dtype, M, W>(values, later, rows, d);
    for (; d < paired_dims<dtype>(dim); d += 2 * lanes) add_value_pairs_tile<dtype, M, 2>(values, later, rows, d);
  }
  if constexpr (TileWeights<dtype, Later>::serves_a_group) {
    for (; d < dim; d += quantization_group) add_values_between<dtype, M>(values, later, rows, d, d + quantization_group);
  } else {
    add_values_between<dtype, M>(values, later, rows, d, dim);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
