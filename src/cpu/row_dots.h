// S = K Q^T of a few query rows, a few keys at a time.
#pragma once

#include "cpu/few_rows.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Keys of a tile of M rows: M * dot_keys accumulators and as many vectors of K leave a register for Q.
template <int M, int rows>
constexpr int dot_keys = many_registers || M < 3 ? rows : rows / 2;

// Sums of the lanes of each 128-bit part of four vectors: those of all four, part by part.
template <class V>
FA_INLINE V sums_in_parts(V a, V b, V c, V d) {
  // Neighbouring lanes first: [a0 + a2, b0 + b2, a1 + a3, b1 + b3] of each part.
  const auto pairs = [](V x, V y) { return unpack_low(x, y) + unpack_high(x, y); };
  return pairs(pairs(a, c), pairs(b, d));
}

// visit(i, the sum of x[i]'s 128-bit parts).
template <class V, int count, class Visit>
FA_INLINE void for_each_sum_of_parts(const V (&x)[count], Visit visit) {
  constexpr int at_once = lanes / 4;
  unroll<(count + at_once - 1) / at_once>([&](auto group) FA_INLINE_IF_FAST {
    V several[at_once];
    unroll<at_once>([&](auto i) { several[i] = group * at_once + i < count ? x[(group * at_once + i) % count] : V{}; });
    const V sums = sums_of_parts(several);
    unroll<at_once>([&](auto i) {
      if constexpr (group * at_once + i < count) visit(group * at_once + i, part_of<i>(sums));
    });
  });
}

// visit(i, the sums of the lanes of x[4 i] to x[4 i + 3]); there are zeros after the last.
template <class V, int count, class Visit>
FA_INLINE void for_each_sums_of_lanes(const V* x, Constant<count>, Visit visit) {
  V in_parts[(count + 3) / 4];
#pragma GCC unroll 8
  for (int i = 0; i < count; i += 4) {
    const auto at = [&](int j) { return j < count ? x[j] : V{}; };
    in_parts[i / 4] = sums_in_parts(at(i), at(i + 1), at(i + 2), at(i + 3));
  }
  for_each_sum_of_parts(in_parts, visit);
}

// acc[key][row] += K_key . Q_row, a vector of partial sums. q [M][q_stride], zeros after the last dim.
template <DType dtype, int K, int M, class Later>
FA_INLINE void add_dots(const KeyRow<dtype>* keys, Later later, const float* q, std::int64_t q_stride, int dim,
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
  if constexpr (multiplies_pairs<dtype>) {
    for (; d < paired_dims<dtype>(dim); d += 2 * lanes) {
#pragma GCC unroll 8
      for (int i = 0; i < K; ++i) k[i] = keys[i].load_words(d);
      later.template ask<K>(keys, row_bytes<dtype>(d));
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec row = load(q + m * q_stride + d / 2);
#pragma GCC unroll 8
        for (int i = 0; i < K; ++i) acc[i][m] = Bfloat16Operand::multiply_add(acc[i][m], k[i], row);
      }
    }
    q -= d / 2;
  } else if constexpr (paired_dims<dtype>(2 * lanes) > 0) {
    for (; d < paired_dims<dtype>(dim); d += 2 * lanes) {
      unroll<2>([&](auto odd) {
#pragma GCC unroll 8
        for (int i = 0; i < K; ++i) k[i] = keys[i].template load_pair<odd>(d);
        if (!odd) later.template ask<K>(keys, row_bytes<dtype>(d));
        add(d + odd * lanes, k);
      });
    }
  }
  for (; d + lanes <= dim; d += lanes) {
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) k[i] = keys[i].load(d);
    later.template ask<K>(keys, row_bytes<dtype>(d));
    add(d, k);
  }
  if constexpr (KeyRow<dtype>::has_tail) {
    if (d == dim) return;
    for (int i = 0; i < K; ++i) k[i] = keys[i].load_tail(d, dim - d);
    add(d, k);
  }
}

// scores[key * stride + row] = scale * K_key . Q_row, or added to what is there.
template <DType dtype, int K, int M, class Later>
FA_INLINE void dots_tile(const KeyRow<dtype>* keys, Later later, const float* q, std::int64_t q_stride, int dim, float scale,
                         bool add, float* scores, std::int64_t stride) {
  Vec acc[K][M] = {};
  add_dots<dtype, K, M>(keys, later, q, q_stride, dim, acc);
  if constexpr (M == tile_rows) {
    for_each_sums_of_lanes(acc[0], Constant<K * M>{}, [&](int key, Part sums) {
      sums *= scale * keys[key].factor();
      if (add) sums += load_part(scores + key * stride);
      std::memcpy(scores + key * stride, &sums, sizeof(sums));
    });
  } else {
    float sums[round_up(K * M, 4)];
    for_each_sums_of_lanes(acc[0], Constant<K * M>{},
                           [&](int i, Part four) { std::memcpy(sums + 4 * i, &four, sizeof(four)); });
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
}

template <DType dtype, int M, class Later>
inline FA_INLINE_IF_FAST void dots(const KeyRow<dtype>* keys, Later later, const float* q, std::int64_t q_stride, int dim,
                                   float scale, bool add, float* scores, std::int64_t stride) {
  constexpr int at_once = dot_keys<M, Later::rows>;
  for (int key = 0; key < Later::rows; key += at_once) {
    dots_tile<dtype, at_once, M>(keys + key, later.from(key), q, q_stride, dim, scale, add, scores + key * stride, stride);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
