// Elements of any dtype as double, written from the formats' definition and not from the kernels' conversions.
#pragma once

#include <cstdint>

#include "attention_problem.h"

namespace flash_attn::test {

/// Bytes; of an affine tensor, whose strides count words, those of a word.
std::int64_t element_size(DType dtype);

double read_element(const void* data, DType dtype, std::int64_t index);

/// Rounds to nearest even.
void write_element(void* data, DType dtype, std::int64_t index, double value);

/// Half the distance between neighbours at `value`: what rounding to `dtype` may cost a correct result.
double rounding_error(DType dtype, double value);

/// A quantised cache: codes that mean nothing without their scales.
bool has_codes(DType dtype);
std::int32_t lowest_code(DType dtype);
std::int32_t highest_code(DType dtype);
/// Codes that share a scale, of a row of `dim`.
std::int64_t codes_of_group(DType dtype, std::int64_t dim);

/// Code `d` of the row that starts at element `row`.
std::int32_t read_code(const void* data, DType dtype, std::int64_t row, std::int64_t d);
void write_code(void* data, DType dtype, std::int64_t row, std::int64_t d, std::int32_t code);

}  // namespace flash_attn::test
