// S = K Q^T and O += P V of a few query rows and an int8 cache, in integers.
#pragma once

#include "cpu/byte_rows.h"
#include "cpu/few_rows.h"
#include "cpu/row_dots.h"
#include "cpu/row_values.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// scores[key * stride + row] = K_key . Q_row. q [M][q_stride] words.
template <int K, int M, class Later>
FA_INLINE void integer_dots_tile(const ByteRows<Later>& keys, int first_key, Later later, const std::int32_t* q,
                                 std::int64_t q_stride, int dim, std::int32_t* scores, std::int64_t stride) {
  IVec acc[K][M] = {};
  const auto add = [&](int d, const IVec(&k)[K]) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const IVec row = load_words(q + m * q_stride + d / 2);
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) acc[i][m] = IntegerOperand::multiply_add(acc[i][m], k[i], row);
    }
  };
  IVec k[K];
  int d = 0;
  for (; d + int8_chunk <= dim; d += int8_chunk) {
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) k[i] = IntegerOperand::word_of_row(keys.load(first_key + i, d));
    if (d % cache_line == 0) later.template ask<K>(d);
    add(d, k);
  }
  if (d < dim) {
    for (int i = 0; i < K; ++i) k[i] = IntegerOperand::word_of_row(keys.load_tail(first_key + i, d, dim - d));
    add(d, k);
  }
  using FourSums = std::int32_t __attribute__((vector_size(16)));
  if constexpr (M == tile_rows) {
    for_each_sums_of_lanes(acc[0], Constant<K * M>{},
                           [&](int key, FourSums sums) { std::memcpy(scores + key * stride, &sums, sizeof(sums)); });
  } else {
    std::int32_t sums[round_up(K * M, 4)];
    for_each_sums_of_lanes(acc[0], Constant<K * M>{},
                           [&](int i, FourSums four) { std::memcpy(sums + 4 * i, &four, sizeof(four)); });
#pragma GCC unroll 8
    for (int key = 0; key < K; ++key) std::memcpy(scores + key * stride, sums + key * M, M * sizeof(*sums));
  }
}

template <int M, class Later>
inline FA_INLINE_IF_FAST void integer_dots(const ByteRows<Later>& keys, Later later, const std::int32_t* q,
                                           std::int64_t q_stride, int dim, std::int32_t* scores, std::int64_t stride) {
  constexpr int at_once = dot_keys<M, Later::rows>;
  for (int key = 0; key < Later::rows; key += at_once) {
    integer_dots_tile<at_once, M>(keys, key, later.from(key), q, q_stride, dim, scores + key * stride, stride);
  }
}

constexpr int value_bytes_near = 256;  // before a value is read, it is asked for once more, for L1

// sums[row][d] += sum over keys of p[key][row] * V_key[d], for W vectors of dims. Out of line, so that its loop has all
// registers.
template <int M, int W, class Later>
__attribute__((noinline)) void add_integer_values_tile(const ByteRows<Later>& values, Later later,
                                                       const StepWeights<std::int32_t, Later>& weights, int row, int d,
                                                       int tail, const BlockSums& block) {
  IVec acc[M][W] = {};
  const auto for_each_sum = [&](auto visit) FA_INLINE_IF_FAST {
    unroll<M>([&](auto m) FA_INLINE_IF_FAST {
      unroll<W>([&](auto w) FA_INLINE_IF_FAST { visit(acc[m][w], (row + m) * block.stride + d + w * lanes, row + m); });
    });
  };
  if (!block.is_first) for_each_sum([&](IVec& sum, std::int64_t at, int) { sum = load_words(block.sums + at); });
    // Not unrolled: GCC would load all keys at once, for which there are no registers.
#pragma GCC unroll 1
  for (int pair = 0; pair < (weights.keys + 1) / 2; ++pair) {
    IVec v[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; w += 2) {
      const auto bytes = [&](int key) { return tail > 0 ? values.load_tail(key, d, tail) : values.load(key, d + w * lanes); };
      const Bytes first = bytes(2 * pair);
      const Bytes second = bytes(2 * pair + 1);
      v[w] = IntegerOperand::word_of_rows<0>(first, second);
      v[w + 1] = IntegerOperand::word_of_rows<1>(first, second);
    }
    for (int byte = 0; byte < W * lanes; byte += cache_line) {
      later.from(2 * pair).template ask<2>(d + byte);
      values.ask(2 * pair, d + byte + value_bytes_near);
      values.ask(2 * pair + 1, d + byte + value_bytes_near);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const IVec weight = splat(weights.of_key[2 * pair][row + m]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[m][w] = IntegerOperand::multiply_add(acc[m][w], v[w], weight);
    }
  }
  if (!block.is_last) return for_each_sum([&](IVec sum, std::int64_t at, int) { store_words(block.sums + at, sum); });
  for_each_sum([&](IVec sum, std::int64_t at, int of_row) {
    store(block.o + at, load(block.o + at) * block.rescale[of_row] + to_float(sum) * block.row_units[of_row]);
  });
}

template <int M, class Later>
inline FA_INLINE_IF_FAST void add_integer_values(const ByteRows<Later>& values, Later later,
                                                 const StepWeights<std::int32_t, Later>& weights, int row, int dim,
                                                 const BlockSums& block) {
  constexpr int W = value_vectors;
  int d = 0;
  for (; d + W * lanes <= dim; d += W * lanes) add_integer_values_tile<M, W>(values, later, weights, row, d, 0, block);
  for (; d < dim; d += int8_chunk) {
    add_integer_values_tile<M, 2>(values, later, weights, row, d, d + int8_chunk <= dim ? 0 : dim - d, block);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
