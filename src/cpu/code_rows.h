// Rows of q and of P in two bytes each, where they meet MLX's codes.
//
// A number is 256 high + low, and a product of codes is made of each. q and P are as fine as for an int8 cache
// (integer_rows.h), but for a bit. A group's bias counts for all of its dims: S takes it times the sum of q, O times P.
#pragma once

#include "cpu/code_operand.h"
#include "cpu/integer_rows.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr float largest_of_two_bytes = 127.0f * 256 + 127;

// ---- q

// Words of four bytes, in the order in which a key's codes come: of 4 bits eight at a time, the even ones first.
template <DType dtype>
inline void order_query_bytes(std::int8_t (&bytes)[quantization_group]) {
  if constexpr (codes_of_byte<dtype> == 2) {
    using EightBytes = std::int8_t __attribute__((vector_size(8)));
    for (int d = 0; d < quantization_group; d += 8) {
      EightBytes some;
      std::memcpy(&some, bytes + d, sizeof(some));
      some = __builtin_shufflevector(some, some, 0, 2, 4, 6, 1, 3, 5, 7);
      std::memcpy(bytes + d, &some, sizeof(some));
    }
  }
}

// Of numbers [dim], whose 1 stands for `unit`: words[word * stride], a high one and a low one side by side, and sums [groups].
template <DType dtype>
inline void split_query(const std::int16_t* numbers, float unit, int dim, std::int32_t* words, std::int64_t stride,
                        float* sums) {
  using FewBytes = std::int8_t __attribute__((vector_size(lanes)));
  using FewNumbers = std::int16_t __attribute__((vector_size(2 * lanes)));
  for (int group = 0; group < dim / quantization_group; ++group, numbers += quantization_group) {
    std::int8_t high_bytes[quantization_group];
    std::int8_t low_bytes[quantization_group];
    IVec sum = {};
    for (int d = 0; d < quantization_group; d += lanes) {
      FewNumbers some;
      std::memcpy(&some, numbers + d, sizeof(some));
      const IVec number = __builtin_convertvector(some, IVec);
      const IVec high = (number + 128) >> 8;
      const FewBytes high_byte = __builtin_convertvector(high, FewBytes);
      const FewBytes low_byte = __builtin_convertvector(number - (high << 8), FewBytes);
      std::memcpy(high_bytes + d, &high_byte, sizeof(high_byte));
      std::memcpy(low_bytes + d, &low_byte, sizeof(low_byte));
      sum += number;
    }
    std::int32_t total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
    sums[group] = static_cast<float>(total) * unit;
    order_query_bytes<dtype>(high_bytes);
    order_query_bytes<dtype>(low_bytes);
    for (int word = 0; word < quantization_group / 4; ++word, words += stride) {
      std::memcpy(words, high_bytes + 4 * word, sizeof(*words));
      std::memcpy(words + 1, low_bytes + 4 * word, sizeof(*words));
    }
  }
}

// ---- P

// Words of four neighbouring keys' weights, of one group of dims. The keys of a word come as 0, 2, 1, 3.
struct CodeWeights {
  std::int32_t* high;  // [key / 4][stride]
  std::int32_t* low;
  std::int64_t stride;
  float* units;   // [row]: what 1 stands for, NaN where a product is
  float* biases;  // [row]: the sum of P times the values' biases

  CodeWeights from_key(int key) const { return {high + key / 4 * stride, low + key / 4 * stride, stride, units, biases}; }
};

// What four vectors of weights are as bytes.
struct WordsOfWeights {
  IVec high;
  IVec low;

  FA_INLINE explicit WordsOfWeights(const Vec (&numbers)[4]) {
    // number + 128 is 256 high + low + 128.
    const auto shifted = [&](int i) { return IntegerOperand::rounded(numbers[i] + 128.0f); };
    const IVec first = (shifted(0) & 0xffff) | (shifted(1) << 16);
    const IVec second = (shifted(2) & 0xffff) | (shifted(3) << 16);
    constexpr auto odd_bytes = static_cast<std::int32_t>(0xff00ff00);
    constexpr auto signs = static_cast<std::int32_t>(0x80808080);
    high = ((first >> 8) & ~odd_bytes) | (second & odd_bytes);
    low = ((first & ~odd_bytes) | ((second << 8) & odd_bytes)) ^ signs;
  }
};

// Of P [key][row] of a block, with the scales and biases of one group, [key][head of the unit]. What rounding takes from the
// weights is given back times `middle_code`: so an error counts as far as a code is from there, not from 0.
inline void quantize_code_weights(const Unit& unit, int keys, const float* scales, const float* biases, float middle_code,
                                  const float* p, std::int64_t stride, const CodeWeights& weights) {
  for (int first = 0; first < unit.packed_rows(); first += lanes) {
    const ScalesOfRows scales_of_rows(unit, scales, first);
    const ScalesOfRows biases_of_rows(unit, biases, first);
    const auto weight_of = [&](int key) { return load(p + key * stride + first) * scales_of_rows.of_key(key); };
    IVec magnitudes = {};
    Vec bias = {};
    Vec sum = {};
    for (int key = 0; key < keys; ++key) {
      const Vec weight = weight_of(key);
      magnitudes = larger_bits_of(magnitudes, bits_of(abs_of(weight)));
      sum += weight;
      bias += load(p + key * stride + first) * biases_of_rows.of_key(key);
    }
    const Vec largest = scales_of_rows.of_rows_only(from_bits(magnitudes));
    const Vec unit_of_row = unit_of_weights(largest, largest_of_two_bytes);
    const Vec inverse = 1.0f / unit_of_row;
    IVec sum_of_high = {};
    IVec sum_of_low = {};
    for (int key = 0; key < keys; key += 4) {
      Vec numbers[4] = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (key + i < keys) numbers[i] = weight_of(key + i) * inverse;
      }
      const WordsOfWeights words(numbers);
      const std::int64_t at = key / 4 * weights.stride + first;
      store_words(weights.high + at, words.high);
      store_words(weights.low + at, words.low);
      sum_of_high = CodeOperand::multiply_add(sum_of_high, splat(0x01010101), words.high);
      sum_of_low = CodeOperand::multiply_add(sum_of_low, splat(0x01010101), words.low);
    }
    const Vec lost = sum - to_float((sum_of_high << 8) + sum_of_low) * unit_of_row;
    store(weights.units + first, unit_of_row);
    store(weights.biases + first, scales_of_rows.of_rows_only(bias + lost * middle_code));
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
