// One head's row of k or v, whatever its dtype: read along its dims, `lanes` at a time, in float32.
#pragma once

#include "cpu/convert.h"
#include "cpu/key_slot.h"
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

template <DType dtype>
constexpr int row_bytes(int dim) {
  if (dtype == DType::affine4) return dim / 2;
  if (dtype == DType::affine8 || dtype == DType::int8) return dim;
  return dtype == DType::float32 ? dim * 4 : dim * 2;
}

// Dims of a row, from the first one on, that are read in pairs of vectors: of 2 * lanes bfloat16 the even ones, then the odd
// ones. A shift and a mask make float32 of them, where widening them in order takes twice as many instructions.
template <DType dtype>
constexpr int paired_dims(int dim) {
  return dtype == DType::bfloat16 ? dim / (2 * lanes) * (2 * lanes) : 0;
}

// The dims of a row in the order in which those of `dtype` are read, and back.
template <DType dtype>
inline void pair_dims(float* row, int dim) {
  float pairs[2 * lanes];
  for (int d = 0; d < paired_dims<dtype>(dim); d += 2 * lanes) {
    std::memcpy(pairs, row + d, sizeof(pairs));
    for (int i = 0; i < 2 * lanes; ++i) row[d + i % 2 * lanes + i / 2] = pairs[i];
  }
}
template <DType dtype>
inline void unpair_dims(float* row, int dim) {
  float in_order[2 * lanes];
  for (int d = 0; d < paired_dims<dtype>(dim); d += 2 * lanes) {
    for (int i = 0; i < 2 * lanes; ++i) in_order[i] = row[d + i % 2 * lanes + i / 2];
    std::memcpy(row + d, in_order, sizeof(in_order));
  }
}

// A copy of the `count` elements of a row that are left, zeros after them: reads no further than the row.
struct RowTail {
  alignas(64) char bytes[lanes * sizeof(float)] = {};
  FA_INLINE RowTail(const char* rest, int count, std::int64_t size) {
    std::memcpy(bytes, rest, static_cast<std::size_t>(count * size));
  }
};

// load(d) gives dims [d, d + lanes) over factor(), load_tail(d, count) when only `count` are left, load_pair<odd>(d) every
// second one of [d, d + 2 * lanes).
template <DType dtype>
class KeyRow {
 public:
  static constexpr bool has_tail = true;

  KeyRow() = default;
  FA_INLINE KeyRow(const KeyTensor& source, KeySlot slot, std::int32_t head) : row_(first_element(source, slot, head)) {}

  FA_INLINE Vec load(int d) const { return load_from(row_ + d * size_of(dtype)); }
  FA_INLINE Vec load_tail(int d, int count) const {
    return load_from(RowTail(row_ + d * size_of(dtype), count, size_of(dtype)).bytes);
  }
  template <int odd>
  FA_INLINE Vec load_pair(int d) const {
    static_assert(dtype == DType::bfloat16);
    const IVec bits = bits_of(FA_LEVEL::load(reinterpret_cast<const float*>(row_ + d * size_of(dtype))));
    return from_bits(odd ? bits & static_cast<std::int32_t>(0xffff0000) : bits << 16);
  }
  FA_INLINE float factor() const { return 1.0f; }

 private:
  static FA_INLINE Vec load_from(const char* p) {
    if constexpr (dtype == DType::float32) {
      return FA_LEVEL::load(reinterpret_cast<const float*>(p));
    } else {
      return load_as(dtype, reinterpret_cast<const std::uint16_t*>(p));
    }
  }

  const char* row_;
};

template <>
class KeyRow<DType::int8> {
 public:
  static constexpr bool has_tail = true;

  KeyRow() = default;
  FA_INLINE KeyRow(const KeyTensor& source, KeySlot slot, std::int32_t head) : row_(first_element(source, slot, head)) {
    const ConstQuantization& quantization = *source.quantization;
    const auto* scales = static_cast<const float*>(quantization.scales);
    scale_ = slot.exists() ? scales[slot.offset(quantization.scale_strides, head)] : 0.0f;
  }

  FA_INLINE Vec load(int d) const { return from_int8(row_ + d); }
  FA_INLINE Vec load_tail(int d, int count) const { return from_int8(RowTail(row_ + d, count, 1).bytes); }
  FA_INLINE float factor() const { return scale_; }

 private:
  const char* row_;
  float scale_;
};

template <DType dtype>
requires(dtype == DType::affine8 || dtype == DType::affine4) class KeyRow<dtype> {
 public:
  static constexpr bool has_tail = false;  // whole groups only

  KeyRow() = default;
  FA_INLINE KeyRow(const KeyTensor& source, KeySlot slot, std::int32_t head) : row_(first_element(source, slot, head)) {
    const ConstQuantization& quantization = *source.quantization;
    const int groups = source.dim / quantization_group;
    if (!slot.exists()) {
      std::memset(scales_, 0, sizeof(scales_));
      std::memset(biases_, 0, sizeof(biases_));
      return;
    }
    const auto read = [&](const void* data, const Strides& strides, float* values) {
      read_row(quantization.dtype, element(data, quantization.dtype, slot.offset(strides, head)), strides.dim, groups, values);
    };
    read(quantization.scales, quantization.scale_strides, scales_);
    read(quantization.biases, quantization.bias_strides, biases_);
  }

  FA_INLINE Vec load(int d) const {
    const int group = d / quantization_group;
    const Vec codes = dtype == DType::affine8 ? from_uint8(row_ + d) : from_uint4(row_ + d / 2);
    return dequantized(codes, splat(scales_[group]), splat(biases_[group]));
  }
  FA_INLINE float factor() const { return 1.0f; }

 private:
  // Rounded up so that whole vectors fit.
  static constexpr int max_groups = round_up(max_head_dim_of_tensor / quantization_group, lanes);
  const char* row_;
  float scales_[max_groups];
  float biases_[max_groups];
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
