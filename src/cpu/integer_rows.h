// Rows of q in integers of 15 bits and a sign, where they meet a quantised cache, and of P, where that is of int8.
//
// A row of q is over a power of two: of a float16 row only elements below a sixteenth of the largest are rounded, of a bfloat16
// row those below a 128th. A row of P is multiplied by its values' scales first, and over the largest product of a block of
// keys. Both are finer than 16-bit results, not than float32.
#pragma once

#include <cmath>

#include "cpu/integer_operand.h"
#include "cpu/key_walk.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr float largest_int16 = 32767.0f;

// What 1 stands for where the largest weight is to be `limit`; NaN where that weight is. Its inverse is finite.
FA_INLINE Vec unit_of_weights(Vec largest, float limit) { return larger_of(splat(1e-37f), largest * (1.0f / limit)); }

// Larger of the bits of non-negative floats: those of NaN are larger than any number's.
FA_INLINE IVec larger_bits_of(IVec a, IVec b) { return a > b ? a : b; }

// Numbers of a row [round_up(dim, lanes)] over a power of two, none larger than `limit`; zeros after its last dim and up to a
// whole vector of words. Gives what 1 stands for, NaN where the row has NaN or inf.
inline float quantize_query(const float* row, int dim, float limit, std::int16_t* numbers) {
  IVec magnitudes = {};
  for (int d = 0; d < dim; d += lanes) magnitudes = larger_bits_of(magnitudes, bits_of(abs_of(load(row + d))));
  std::int32_t bits = 0;
  for (int lane = 0; lane < lanes; ++lane) bits = max_of(bits, magnitudes[lane]);
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  std::memset(numbers, 0, static_cast<std::size_t>(round_up(dim, int8_chunk)) * sizeof(*numbers));
  if (!(largest < __builtin_inff())) return __builtin_nanf("");
  int exponent = 0;  // largest < 2^exponent
  std::frexp(largest, &exponent);
  float unit = std::ldexp(1.0f, max_of(exponent - 15, -120));
  while (largest > limit * unit) unit *= 2.0f;
  for (int d = 0; d < dim; d += lanes) {
    const Half some = __builtin_convertvector(IntegerOperand::rounded(load(row + d) * (1.0f / unit)), Half);
    std::memcpy(numbers + d, &some, sizeof(some));
  }
  return unit;
}

// scales[key][head of the unit] of a block; 0 on a page that does not exist.
inline void read_scales(const DecodePass& pass, const Unit& unit, const KeyTensor& source, const KeySlots& keys,
                        float* scales) {
  const ConstQuantization& quantization = *source.quantization;
  for_each_stretch(*pass.problem, *pass.inputs, unit.sequence, unit.batch, {keys.begin, keys.begin + keys.count},
                   [&](std::int32_t key, std::int32_t stretch, KeySlot slot) {
                     read_group_numbers(DType::float32, quantization.scales, quantization.scale_strides, slot, stretch,
                                        unit.kv_head, unit.kv_heads, 1, scales + (key - keys.begin) * unit.kv_heads);
                   });
}

// The scales of a block's keys for some rows of a unit, a vector of them.
class ScalesOfRows {
 public:
  // With `lanes` floats to read after the last scale.
  ScalesOfRows(const Unit& unit, const float* scales, int first_row)
      : first_(scales + first_row / unit.rows_of_head()), heads_(unit.kv_heads) {
    const int rows = unit.packed_rows();
    for (int lane = 0; lane < lanes; ++lane) {
      const int row = min_of(first_row + lane, rows - 1);
      head_of_lane_[lane] = row / unit.rows_of_head() - first_row / unit.rows_of_head();
      is_row_[lane] = first_row + lane < rows ? -1 : 0;
    }
  }
  FA_INLINE Vec of_key(int key) const {
    const float* scales = first_ + std::int64_t{key} * heads_;
#if defined(__AVX512F__) && FA_VECTOR_BYTES == 64
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(head_of_lane_), load(scales));
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
    return _mm256_permutevar8x32_ps(load(scales), reinterpret_cast<__m256i>(head_of_lane_));
#else
    Vec x;
    for (int lane = 0; lane < lanes; ++lane) x[lane] = scales[head_of_lane_[lane]];
    return x;
#endif
  }
  // 0 in the lanes after the last row.
  FA_INLINE Vec of_rows_only(Vec x) const { return select(is_row_, x, Vec{}); }

 private:
  const float* first_;
  int heads_;
  IVec head_of_lane_;
  IVec is_row_;
};

// scores[key][row] = scale * factors[row] * scales[key] * integers[key][row], or added to what is there.
inline void scale_scores(const Unit& unit, int keys, const float* scales, const std::int32_t* integers, const float* factors,
                         float scale, bool add, float* scores, std::int64_t stride) {
  for (int first = 0; first < unit.packed_rows(); first += lanes) {
    const ScalesOfRows scales_of_rows(unit, scales, first);
    const Vec of_row = scales_of_rows.of_rows_only(load(factors + first) * scale);
    for (int key = 0; key < keys; ++key) {
      float* to = scores + key * stride + first;
      const Vec score = to_float(load_words(integers + key * stride + first)) * (scales_of_rows.of_key(key) * of_row);
      store(to, add ? load(to) + score : score);
    }
  }
}

// P of a block [key][row], in place: words of two neighbouring keys, at the place of the first. row_units[row] is what 1 stands
// for, NaN where a product is.
inline void quantize_weights(const Unit& unit, int keys, const float* scales, float* p, std::int64_t stride, float* row_units) {
  for (int first = 0; first < unit.packed_rows(); first += lanes) {
    const ScalesOfRows scales_of_rows(unit, scales, first);
    IVec magnitudes = {};
    for (int key = 0; key < keys; ++key) {
      const Vec weight = load(p + key * stride + first) * scales_of_rows.of_key(key);
      store(p + key * stride + first, weight);
      magnitudes = larger_bits_of(magnitudes, bits_of(abs_of(weight)));
    }
    const Vec unit_of_row = unit_of_weights(from_bits(magnitudes), largest_int16);
    store(row_units + first, unit_of_row);
    const Vec inverse = scales_of_rows.of_rows_only(1.0f / unit_of_row);
    for (int key = 0; key < keys; key += 2) {
      float* low = p + key * stride + first;
      const Vec high = key + 1 < keys ? load(low + stride) : Vec{};
      store(low, from_bits(IntegerOperand::word(load(low) * inverse, high * inverse)));
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
