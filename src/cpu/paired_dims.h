// bfloat16 rows where they lie, 2 * lanes dims at a time: in which order decode reads their dims.
//
// A level that multiplies pairs of bfloat16 takes K as it lies, two neighbouring dims a word, and of V the same dim of two keys
// (Bfloat16Operand::word_of_rows). The others widen the even dims, by a shift, then the odd ones, by a mask: each one
// instruction, where widening them in order takes twice as many.
#pragma once

#include "cpu/operand.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Dims of a row, from the first one on, that are read so.
template <DType dtype>
constexpr int paired_dims(int dim) {
  return dtype == DType::bfloat16 ? dim / (2 * lanes) * (2 * lanes) : 0;
}

template <DType dtype>
constexpr bool multiplies_pairs = dtype == DType::bfloat16&& FA_BFLOAT16_DOT == 1;

// A row of q as rows of K are read; a word takes the place of a float, and the dims after the paired ones follow.
template <DType dtype>
inline void pair_dims(float* row, int dim) {
  const int paired = paired_dims<dtype>(dim);
  if constexpr (multiplies_pairs<dtype>) {
    pack_row<Bfloat16Operand>(row, paired, row);
    std::memmove(row + paired / 2, row + paired, static_cast<std::size_t>(dim - paired) * sizeof(float));
  } else {
    float pairs[2 * lanes];
    for (int d = 0; d < paired; d += 2 * lanes) {
      std::memcpy(pairs, row + d, sizeof(pairs));
      for (int i = 0; i < lanes; ++i) row[d + i] = pairs[2 * i];
      for (int i = 0; i < lanes; ++i) row[d + lanes + i] = pairs[2 * i + 1];
    }
  }
}

// A row of O, summed up as rows of V are read, in its own order.
template <DType dtype>
inline void unpair_dims(float* row, int dim) {
  for (int d = 0; d < paired_dims<dtype>(dim); d += 2 * lanes) {
    const Vec first = load(row + d);
    const Vec second = load(row + d + lanes);
    if constexpr (multiplies_pairs<dtype>) {
      store(row + d, interleave_parts_low(first, second));
      store(row + d + lanes, interleave_parts_high(first, second));
    } else {
      store(row + d, interleave_low(first, second));
      store(row + d + lanes, interleave_high(first, second));
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
