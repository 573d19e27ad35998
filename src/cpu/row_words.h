// The caller's rows as words of an operand. Levels that multiply bfloat16 pairs find the words of a bfloat16 row where the row
// lies: nothing becomes float32 on its way to a product.
#pragma once

#include "cpu/pack.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Words of a row, zeros up to a whole panel.
template <class Operand>
constexpr int panel_words(int dim) {
  return round_up(dim, dim_panel) / Operand::per_word;
}

inline const float* words_of_zeros() { return reinterpret_cast<const float*>(zero_row); }

// The row itself where it is that already, else in `buffer`.
template <class Operand>
inline const float* view_words(const ConstTensor& tensor, std::int64_t offset, int dim, float* buffer) {
  if constexpr (Operand::per_word == 1) {
    return view_row(tensor, offset, dim, buffer);
  } else {
    const auto* row = reinterpret_cast<const std::uint16_t*>(element(tensor.data, tensor.dtype, offset));
    if (tensor.strides.dim == 1 && dim % dim_panel == 0) return reinterpret_cast<const float*>(row);
    std::uint16_t values[padded_head_dim];
    std::memset(values + dim, 0, sizeof(values[0]) * static_cast<std::size_t>(round_up(dim, dim_panel) - dim));
    for (int d = 0; d < dim; ++d) values[d] = row[d * tensor.strides.dim];
    std::memcpy(buffer, values, sizeof(float) * static_cast<std::size_t>(panel_words<Operand>(dim)));
    return buffer;
  }
}

// A key's row of k or of v, zeros where KeyReader sees none.
template <class Operand>
inline const float* view_words(const KeyReader& reader, const KeyTensor& source, const Unit& unit, std::int32_t key,
                               float* buffer) {
  if constexpr (Operand::per_word == 1) {
    return reader.view(source, key, buffer);
  } else {
    const KeySlot slot = reader.slot_of(key);
    if (!slot.exists()) return words_of_zeros();
    return view_words<Operand>(*source.tensor, slot.offset(source.tensor->strides, unit.kv_head), source.dim, buffer);
  }
}

// Words of dims [dim, dim + lanes) of rows of words: of one row, or of two whose pairs it makes.
template <class Operand>
FA_INLINE Vec word_of_rows(const float* const (&rows)[Operand::per_word], int dim) {
  if constexpr (Operand::per_word == 1) {
    return load(rows[0] + dim);
  } else {
    Half low;
    Half high;
    __builtin_memcpy(&low, reinterpret_cast<const char*>(rows[0]) + 2 * dim, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(rows[1]) + 2 * dim, sizeof(high));
    return reinterpret_cast<Vec>(__builtin_convertvector(low, UVec) | (__builtin_convertvector(high, UVec) << 16));
  }
}

// sum(a * b) of two rows of words.
template <class Operand>
inline float dot_of_words(const float* a, const float* b, int words) {
  Vec sum = {};
  for (int i = 0; i < words; i += lanes) sum = Operand::multiply_add(sum, load(a + i), load(b + i));
  float total = 0.0f;
  for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
  return total;
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
