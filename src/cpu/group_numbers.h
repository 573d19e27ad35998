// The scales and the biases of MLX's codes, in float32. A number at a time they take as long as the codes themselves, so a
// block's are read together wherever they lie side by side.
#pragma once

#include "cpu/convert.h"
#include "cpu/key_slot.h"
#include "semantics/quantization.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Of a row.
struct GroupNumbers {
  const float* scales;  // [groups]
  const float* biases;
};

// dst[key][head][group] = scales or biases of the heads [head, head + heads) of keys whose slots follow one another from `slot`
// on. A page that does not exist has zeros.
inline void read_group_numbers(DType dtype, const void* data, const Strides& strides, KeySlot slot, std::int32_t keys,
                               std::int32_t head, std::int32_t heads, int groups, float* dst) {
  const int of_key = heads * groups;
  if (!slot.exists()) {
    std::memset(dst, 0, static_cast<std::size_t>(keys) * static_cast<std::size_t>(of_key) * sizeof(float));
    return;
  }
  const auto read = [&](std::int32_t key, std::int32_t of_head, std::int64_t stride, int count) {
    const std::int64_t offset = KeySlot{slot.row, slot.index + key}.offset(strides, head + of_head);
    read_row(dtype, element(data, dtype, offset), stride, count, dst + std::int64_t{key} * of_key + of_head * groups);
  };
  const bool heads_are_dense = (groups == 1 || strides.dim == 1) && (heads == 1 || strides.head == groups);
  if (heads_are_dense && strides.seq == of_key) return read(0, 0, 1, keys * of_key);
  // One at a time, as int8's scales in caches head after head, without a call for each.
  if (groups == 1 && dtype == DType::float32) {
    const auto* numbers = reinterpret_cast<const float*>(element(data, dtype, slot.offset(strides, head)));
    for (std::int32_t key = 0; key < keys; ++key, numbers += strides.seq) {
      for (std::int32_t i = 0; i < heads; ++i) *dst++ = numbers[i * strides.head];
    }
    return;
  }
  for (std::int32_t key = 0; key < keys; ++key) {
    if (heads_are_dense) {
      read(key, 0, 1, of_key);
    } else {
      for (std::int32_t i = 0; i < heads; ++i) read(key, i, strides.dim, groups);
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
