// One head's row of k or v, whatever its dtype: read along its dims, `lanes` at a time, in float32.
#pragma once

#include "cpu/group_numbers.h"
#include "cpu/operand.h"
#include "cpu/paired_dims.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// What a page that does not exist holds.
alignas(64) constexpr char zero_row[row_floats(max_head_dim_of_tensor) * sizeof(float)] = {};

// k or v of a call.
struct KeyTensor {
  const ConstTensor* tensor;
  const ConstQuantization* quantization;
  int dim;
};

inline KeyTensor keys_of(const AttentionProblem& problem, const AttentionInputs& inputs) {
  return {&inputs.k, &inputs.cache.k, problem.head_dim};
}
inline KeyTensor values_of(const AttentionProblem& problem, const AttentionInputs& inputs) {
  return {&inputs.v, &inputs.cache.v, problem.head_dim_v};
}

// Of a row of MLX's codes.
inline int groups_of(const KeyTensor& source) { return source.dim / quantization_group; }

inline const char* first_element(const KeyTensor& source, KeySlot slot, std::int32_t head) {
  const ConstTensor& tensor = *source.tensor;
  return slot.exists() ? element(tensor.data, tensor.dtype, slot.offset(tensor.strides, head)) : zero_row;
}

// Which row comes after a row: of the same key and the next head, or of the next key and the same head.
enum class Along : std::uint8_t { heads, keys };

// Elements to it; a page that does not exist is the same row for all.
FA_INLINE std::int64_t step_of(const Strides& strides, KeySlot slot, Along along) {
  if (!slot.exists()) return 0;
  return along == Along::heads ? strides.head : strides.seq;
}
FA_INLINE std::int64_t step_bytes(const KeyTensor& source, KeySlot slot, Along along) {
  return step_of(source.tensor->strides, slot, along) * size_of(source.tensor->dtype);
}

template <DType dtype>
constexpr std::int64_t row_bytes(std::int64_t dim) {
  if (dtype == DType::affine4) return dim / 2;
  if (dtype == DType::affine8 || dtype == DType::int8) return dim;
  return dtype == DType::float32 ? dim * 4 : dim * 2;
}

// A copy of the `count` elements of a row that are left, zeros after them: reads no further than the row. By one store where
// the level can, since whoever loads a vector from several waits for all of them.
struct RowTail {
  alignas(64) char bytes[lanes * sizeof(float)];
  FA_INLINE RowTail(const char* rest, int count, std::int64_t size) {
    const auto left = static_cast<std::size_t>(count * size);
#if defined(__AVX512BW__) && FA_VECTOR_BYTES == 64
    _mm512_store_si512(bytes, _mm512_maskz_loadu_epi8((std::uint64_t{1} << left) - 1, rest));
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
    const __m256i word = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i is_left = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left / 4)), word);
    const __m256i words = _mm256_maskload_epi32(reinterpret_cast<const int*>(rest), is_left);
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), words);
    if (left % 4 != 0) std::memcpy(bytes + left / 4 * 4, rest + left / 4 * 4, left % 4);
#else
    std::memset(bytes, 0, sizeof(bytes));
    std::memcpy(bytes, rest, left);
#endif
  }
};

// load(d) gives dims [d, d + lanes) over factor(), load_tail(d, count) when only `count` are left, load_pair<odd>(d) every
// second one of [d, d + 2 * lanes). from(d) is the row without its first d dims, over factor_from(d). next() goes along the
// axis, so many rows as go_by says, ask(byte) brings the line so far behind the row's first byte into L1.
template <DType dtype>
class KeyRow {
 public:
  static constexpr bool has_tail = true;
  static constexpr bool has_factor = false;  // but 1
  static constexpr bool has_bias = false;

  KeyRow() = default;
  FA_INLINE KeyRow(const KeyTensor& source, KeySlot slot, std::int32_t head, Along along)
      : row_(first_element(source, slot, head)), step_(step_bytes(source, slot, along)) {}
  FA_INLINE void next() { row_ += step_; }
  FA_INLINE void go_by(int rows) { step_ *= rows; }
  FA_INLINE KeyRow from(std::int64_t d) const {
    KeyRow rest = *this;
    rest.row_ += d * size_of(dtype);
    return rest;
  }

  FA_INLINE Vec load(std::int64_t d) const { return load_from(row_ + d * size_of(dtype)); }
  FA_INLINE Vec load_tail(std::int64_t d, int count) const {
    return load_from(RowTail(row_ + d * size_of(dtype), count, size_of(dtype)).bytes);
  }
  template <int odd>
  FA_INLINE Vec load_pair(std::int64_t d) const {
    static_assert(dtype == DType::bfloat16);
    const IVec bits = bits_of(FA_LEVEL::load(reinterpret_cast<const float*>(row_ + d * size_of(dtype))));
    return from_bits(odd ? bits & static_cast<std::int32_t>(0xffff0000) : bits << 16);
  }
  // Two bfloat16 a word.
  FA_INLINE Vec load_words(std::int64_t d) const {
    return FA_LEVEL::load(reinterpret_cast<const float*>(row_ + d * size_of(dtype)));
  }
  static FA_INLINE KeyRow zeros() {
    KeyRow row;
    row.row_ = zero_row;
    row.step_ = 0;
    return row;
  }
  FA_INLINE float factor() const { return 1.0f; }
  FA_INLINE float factor_from(std::int64_t) const { return factor(); }
  FA_INLINE void ask(std::int64_t byte) const { __builtin_prefetch(row_ + byte); }

 private:
  static FA_INLINE Vec load_from(const char* p) {
    if constexpr (dtype == DType::float32) {
      return FA_LEVEL::load(reinterpret_cast<const float*>(p));
    } else {
      return load_as(dtype, reinterpret_cast<const std::uint16_t*>(p));
    }
  }

  const char* row_;
  std::int64_t step_;
};

template <>
class KeyRow<DType::int8> {
 public:
  static constexpr bool has_tail = true;
  static constexpr bool has_factor = true;
  static constexpr bool has_bias = false;

  KeyRow() = default;
  FA_INLINE KeyRow(const KeyTensor& source, KeySlot slot, std::int32_t head, Along along)
      : row_(first_element(source, slot, head)), step_(step_bytes(source, slot, along)) {
    const ConstQuantization& quantization = *source.quantization;
    static constexpr float zero = 0.0f;
    scale_ =
        slot.exists() ? static_cast<const float*>(quantization.scales) + slot.offset(quantization.scale_strides, head) : &zero;
    scale_step_ = step_of(quantization.scale_strides, slot, along);
  }
  FA_INLINE void next() {
    row_ += step_;
    scale_ += scale_step_;
  }
  FA_INLINE void go_by(int rows) {
    step_ *= rows;
    scale_step_ *= rows;
  }
  FA_INLINE KeyRow from(std::int64_t d) const {
    KeyRow rest = *this;
    rest.row_ += d;
    return rest;
  }

  FA_INLINE Vec load(std::int64_t d) const { return from_int8(row_ + d); }
  FA_INLINE Vec load_tail(std::int64_t d, int count) const { return from_int8(RowTail(row_ + d, count, 1).bytes); }
  FA_INLINE float factor() const { return *scale_; }
  FA_INLINE float factor_from(std::int64_t) const { return factor(); }

 private:
  const char* row_;
  std::int64_t step_;
  const float* scale_;
  std::int64_t scale_step_;
};

constexpr bool is_affine(DType dtype) { return dtype == DType::affine8 || dtype == DType::affine4; }

// A row of MLX's codes. from(d) has the codes themselves, of dim d's group: they lack bias_from(d), too.
template <DType dtype>
requires(is_affine(dtype)) class KeyRow<dtype> {
 public:
  static constexpr bool has_tail = false;  // whole groups only
  static constexpr bool has_factor = true;
  static constexpr bool has_bias = true;

  KeyRow() = default;
  FA_INLINE KeyRow(const KeyTensor& source, KeySlot slot, std::int32_t head, Along along, GroupNumbers numbers)
      : row_(first_element(source, slot, head)),
        step_(step_bytes(source, slot, along)),
        groups_(groups_of(source)),
        numbers_(numbers) {}
  FA_INLINE void next() {
    row_ += step_;
    numbers_.scales += groups_;
    numbers_.biases += groups_;
  }
  FA_INLINE auto from(std::int64_t first) const {
    struct Codes {
      const KeyRow& row;
      std::int64_t first;
      FA_INLINE Vec load(std::int64_t d) const { return row.codes(first + d); }
    };
    return Codes{*this, first};
  }
  FA_INLINE float factor_from(std::int64_t d) const { return numbers_.scales[d / quantization_group]; }
  FA_INLINE float bias_from(std::int64_t d) const { return numbers_.biases[d / quantization_group]; }

  FA_INLINE Vec load(std::int64_t d) const {
    const std::int64_t group = d / quantization_group;
    return dequantized(codes(d), splat(numbers_.scales[group]), splat(numbers_.biases[group]));
  }
  FA_INLINE float factor() const { return 1.0f; }

 private:
  FA_INLINE Vec codes(std::int64_t d) const {
    return dtype == DType::affine8 ? from_uint8(row_ + d) : from_uint4(row_ + d / 2);
  }

  const char* row_;
  std::int64_t step_;
  int groups_;
  GroupNumbers numbers_;
};

// scales[key][head][group], and biases alike, of keys whose slots follow one another and of heads side by side.
inline void read_numbers_of_keys(const KeyTensor& source, KeySlot slot, std::int32_t keys, std::int32_t head,
                                 std::int32_t heads, float* scales, float* biases) {
  const ConstQuantization& quantization = *source.quantization;
  const int groups = groups_of(source);
  read_group_numbers(quantization.dtype, quantization.scales, quantization.scale_strides, slot, keys, head, heads, groups,
                     scales);
  read_group_numbers(quantization.dtype, quantization.biases, quantization.bias_strides, slot, keys, head, heads, groups,
                     biases);
}

// dst[dim] = the row in float32.
template <DType dtype>
inline void dequantize_row(const KeyTensor& source, KeySlot slot, std::int32_t head, float* dst) {
  KeyRow<dtype> row;
  constexpr int most_groups = round_up(max_head_dim_of_tensor / quantization_group, lanes);
  [[maybe_unused]] float scales[most_groups];
  [[maybe_unused]] float biases[most_groups];
  if constexpr (is_affine(dtype)) {
    read_numbers_of_keys(source, slot, 1, head, 1, scales, biases);
    row = {source, slot, head, Along::heads, {scales, biases}};
  } else {
    row = {source, slot, head, Along::heads};
  }
  int d = 0;
  for (; d + lanes <= source.dim; d += lanes) store(dst + d, row.load(d) * row.factor());
  if constexpr (KeyRow<dtype>::has_tail) {
    if (d == source.dim) return;
    float rest[lanes];
    store(rest, row.load_tail(d, source.dim - d) * row.factor());
    std::memcpy(dst + d, rest, static_cast<std::size_t>(source.dim - d) * sizeof(float));
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
