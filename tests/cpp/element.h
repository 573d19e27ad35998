// Elements of any dtype as double, written from the formats' definition and not from the kernels' conversions.
#pragma once

#include <cstdint>

#include "attention_problem.h"

namespace flash_attn::test {

std::int64_t element_size(DType dtype);

double read_element(const void* data, DType dtype, std::int64_t index);

/// Rounds to nearest even.
void write_element(void* data, DType dtype, std::int64_t index, double value);

/// Half the distance between neighbours at `value`: what rounding to `dtype` may cost a correct result.
double rounding_error(DType dtype, double value);

}  // namespace flash_attn::test
