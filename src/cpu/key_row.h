// One head's row of k or v, whatever its dtype: read along its dims, `lanes` at a time, in float32.
#pragma once

#include "cpu/convert.h"
#include "cpu/key_slot.h"
#include "cpu/paired_dims.h"
#include "semantics/quantization.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// What a page that does not exist holds.
alignas(64) constexpr char zero_row[max_head_dim_of_tensor * sizeof(float)] = {};

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

inline const char* first_element(const KeyTensor& source, KeySlot slot, std::int32_t head) {
  const ConstTensor& tensor = *source.tensor;
  return slot.exists() ? element(tensor.data, tensor.dtype, slot.offset(tensor.strides, head)) : zero_row;
}

// Bytes from a head's row to the next head's; a page that does not exist is the same row for all.
inline std::int64_t head_step(const KeyTensor& source, KeySlot slot) {
  return slot.exists() ? source.tensor->strides.head * size_of(source.tensor->dtype) : 0;
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
// second one of [d, d + 2 * lanes). from(d) is the row without its first d dims, next_head() goes to the same key's next row,
// ask(byte) brings the line so far behind the row's first byte into L1.
template <DType dtype>
class KeyRow {
 public:
  static constexpr bool has_tail = true;

  KeyRow() = default;
  FA_INLINE KeyRow(const KeyTensor& source, KeySlot slot, std::int32_t head)
      : row_(first_element(source, slot, head)), step_(head_step(source, slot)) {}
  FA_INLINE void next_head() { row_ += step_; }
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

  KeyRow() = default;
  FA_INLINE KeyRow(const KeyTensor& source, KeySlot slot, std::int32_t head)
      : row_(first_element(source, slot, head)), step_(head_step(source, slot)) {
    const ConstQuantization& quantization = *source.quantization;
    static constexpr float zero = 0.0f;
    scale_ =
        slot.exists() ? static_cast<const float*>(quantization.scales) + slot.offset(quantization.scale_strides, head) : &zero;
    scale_step_ = slot.exists() ? quantization.scale_strides.head : 0;
  }
  FA_INLINE void next_head() {
    row_ += step_;
    scale_ += scale_step_;
  }
  FA_INLINE KeyRow from(std::int64_t d) const {
    KeyRow rest = *this;
    rest.row_ += d;
    return rest;
  }

  FA_INLINE Vec load(std::int64_t d) const { return from_int8(row_ + d); }
  FA_INLINE Vec load_tail(std::int64_t d, int count) const { return from_int8(RowTail(row_ + d, count, 1).bytes); }
  FA_INLINE float factor() const { return *scale_; }

 private:
  const char* row_;
  std::int64_t step_;
  const float* scale_;
  std::int64_t scale_step_;
};

// The scales or the biases of a row's groups, one head after the other.
class GroupNumbers {
 public:
  GroupNumbers() = default;
  FA_INLINE GroupNumbers(DType dtype, const void* data, const Strides& strides, KeySlot slot, std::int32_t head)
      : dtype_(dtype),
        row_(slot.exists() ? element(data, dtype, slot.offset(strides, head)) : zero_row),
        step_(slot.exists() ? strides.head * size_of(dtype) : 0),
        stride_(slot.exists() ? strides.dim : 0) {}
  FA_INLINE void read(int groups) { read_row(dtype_, row_, stride_, groups, values_); }
  FA_INLINE void next_head() { row_ += step_; }
  FA_INLINE float operator[](std::int64_t group) const { return values_[group]; }

 private:
  DType dtype_;
  const char* row_;
  std::int64_t step_;    // bytes
  std::int64_t stride_;  // elements
  float values_[max_head_dim_of_tensor / quantization_group];
};

template <DType dtype>
requires(dtype == DType::affine8 || dtype == DType::affine4) class KeyRow<dtype> {
 public:
  static constexpr bool has_tail = false;  // whole groups only

  KeyRow() = default;
  FA_INLINE KeyRow(const KeyTensor& source, KeySlot slot, std::int32_t head)
      : row_(first_element(source, slot, head)),
        step_(head_step(source, slot)),
        groups_(source.dim / quantization_group),
        scales_(source.quantization->dtype, source.quantization->scales, source.quantization->scale_strides, slot, head),
        biases_(source.quantization->dtype, source.quantization->biases, source.quantization->bias_strides, slot, head) {
    read_groups();
  }

  FA_INLINE void next_head() {
    row_ += step_;
    scales_.next_head();
    biases_.next_head();
    read_groups();
  }
  FA_INLINE auto from(std::int64_t first) const {
    struct Rest {
      const KeyRow& row;
      std::int64_t first;
      FA_INLINE Vec load(std::int64_t d) const { return row.load(first + d); }
    };
    return Rest{*this, first};
  }

  FA_INLINE Vec load(std::int64_t d) const {
    const std::int64_t group = d / quantization_group;
    const Vec codes = dtype == DType::affine8 ? from_uint8(row_ + d) : from_uint4(row_ + d / 2);
    return dequantized(codes, splat(scales_[group]), splat(biases_[group]));
  }
  FA_INLINE float factor() const { return 1.0f; }

 private:
  FA_INLINE void read_groups() {
    scales_.read(groups_);
    biases_.read(groups_);
  }

  const char* row_;
  std::int64_t step_;
  int groups_;
  GroupNumbers scales_;
  GroupNumbers biases_;
};

// dst[dim] = the row in float32.
template <DType dtype>
inline void dequantize_row(const KeyTensor& source, KeySlot slot, std::int32_t head, float* dst) {
  const KeyRow<dtype> row(source, slot, head);
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
