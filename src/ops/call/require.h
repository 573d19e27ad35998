// The words of argument checks: each throws an error that names the argument, what it got and what it needs.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "flash_attn/attention.h"
#include "ops/call/call.h"

namespace flash_attn {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

inline std::string text_of(const mx::Shape& shape) {
  std::string result = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + (shape.size() == 1 ? ",)" : ")");
}

template <class Error, class Got, class Needs>
[[noreturn]] void fail(const std::string& argument, const Got& got, const Needs& needs) {
  throw Error(text("[flash_attn] ", argument, ": got ", got, ", needs ", needs));
}

[[noreturn]] inline void fail_shape(const std::string& argument, const mx::array& got, const std::string& needs) {
  fail<std::invalid_argument>(argument, "shape " + text_of(got.shape()), needs);
}

inline void require_shape(const std::string& argument, const mx::array& got, const mx::Shape& shape,
                          const std::string& meaning) {
  if (got.shape() != shape) fail_shape(argument, got, "shape " + text_of(shape) + ", " + meaning);
}

inline void require_rank(const std::string& argument, const mx::array& got, int rank, const std::string& meaning) {
  if (got.ndim() != static_cast<std::size_t>(rank)) fail_shape(argument, got, text(rank, " axes, ", meaning));
}

inline void require_dtype(const std::string& argument, const mx::array& got, mx::Dtype dtype) {
  if (got.dtype() != dtype) fail<TypeError>(argument, text("dtype ", got.dtype()), dtype);
}

inline bool is_kernel_dtype(mx::Dtype dtype) { return dtype == mx::float32 || dtype == mx::bfloat16 || dtype == mx::float16; }

inline void require_floating(const std::string& argument, const mx::array& got) {
  if (!is_kernel_dtype(got.dtype())) {
    fail<TypeError>(argument, text("dtype ", got.dtype()), "float32, bfloat16 or float16");
  }
}

inline void require_finite(const std::string& argument, double got) {
  if (!std::isfinite(static_cast<float>(got))) fail<std::invalid_argument>(argument, got, "a finite float32");
}

inline void require_at_least(const std::string& argument, int got, int least) {
  if (got < least) fail<std::invalid_argument>(argument, got, text("an integer of at least ", least));
}

/// Whether reading the values of an array waits for nothing.
inline bool is_ready(const mx::array& array) {
  // A transformation's placeholder counts as available but has no data.
  return !array.is_tracer() && array.data_shared_ptr() && array.is_available();
}

/// The values of an int32 array of one or two axes, row after row, if they are ready.
inline std::optional<std::vector<std::int32_t>> values_if_ready(const mx::array& array) {
  if (!is_ready(array)) return std::nullopt;
  const bool is_table = array.ndim() == 2;
  const std::int64_t row_stride = is_table ? array.strides(0) : 0;
  const auto* row = array.data<std::int32_t>();
  std::vector<std::int32_t> values;
  values.reserve(array.size());
  for (int i = is_table ? array.shape(0) : 1; i > 0; --i, row += row_stride) {
    for (int j = 0; j < array.shape(-1); ++j) values.push_back(row[j * array.strides(-1)]);
  }
  return values;
}

}  // namespace flash_attn
