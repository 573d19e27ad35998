#include "element.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace flash_attn::test {
namespace {

struct Format {
  int mantissa_bits;
  int exponent_bits;
  int min_exponent;  // of normal numbers
};

constexpr Format float32_format = {23, 8, -126};
constexpr Format bfloat16_format = {7, 8, -126};
constexpr Format float16_format = {10, 5, -14};

Format format_of(DType dtype) {
  return dtype == DType::float32 ? float32_format : dtype == DType::bfloat16 ? bfloat16_format : float16_format;
}

double decode(Format format, std::uint32_t bits) {
  const int exponent = static_cast<int>(bits >> format.mantissa_bits) & ((1 << format.exponent_bits) - 1);
  const int mantissa = static_cast<int>(bits) & ((1 << format.mantissa_bits) - 1);
  const bool negative = (bits >> (format.mantissa_bits + format.exponent_bits)) & 1u;
  double magnitude;
  if (exponent == (1 << format.exponent_bits) - 1) {
    magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, format.min_exponent - format.mantissa_bits);
  } else {
    const int significand = mantissa + (1 << format.mantissa_bits);
    magnitude = std::ldexp(significand, exponent - 1 + format.min_exponent - format.mantissa_bits);
  }
  return negative ? -magnitude : magnitude;
}

int exponent_of(Format format, double magnitude) { return std::max(std::ilogb(magnitude), format.min_exponent); }

std::uint32_t encode(Format format, double value) {
  const std::uint32_t infinity = ((1u << format.exponent_bits) - 1) << format.mantissa_bits;
  const std::uint32_t sign = std::signbit(value) ? 1u << (format.mantissa_bits + format.exponent_bits) : 0u;
  if (std::isnan(value)) return sign | infinity | (1u << (format.mantissa_bits - 1));
  const double magnitude = std::abs(value);
  if (std::isinf(magnitude)) return sign | infinity;
  const int exponent = exponent_of(format, magnitude);
  if (exponent > -format.min_exponent + 1) return sign | infinity;
  // The leading 1 of a normal significand carries into the exponent field, as does a significand that rounds up to 2.
  const auto units = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, format.mantissa_bits - exponent)));
  const std::uint32_t bits = (static_cast<std::uint32_t>(exponent - format.min_exponent) << format.mantissa_bits) + units;
  return sign | std::min(bits, infinity);
}

// MLX packs the first code into the lowest bits of a word.
struct CodePlace {
  std::int64_t word;
  int shift;
  std::uint32_t mask;

  CodePlace(DType dtype, std::int64_t row, std::int64_t d) {
    const int bits = dtype == DType::affine8 ? 8 : 4;
    const int codes_of_word = 32 / bits;
    word = row + d / codes_of_word;
    shift = static_cast<int>(d % codes_of_word) * bits;
    mask = (1u << bits) - 1;
  }
};

std::uint32_t word_at(const void* data, std::int64_t index) {
  std::uint32_t word;
  std::memcpy(&word, static_cast<const char*>(data) + 4 * index, sizeof(word));
  return word;
}

}  // namespace

std::int64_t element_size(DType dtype) {
  if (dtype == DType::boolean || dtype == DType::int8) return 1;
  return dtype == DType::bfloat16 || dtype == DType::float16 ? 2 : 4;
}

double read_element(const void* data, DType dtype, std::int64_t index) {
  const char* address = static_cast<const char*>(data) + index * element_size(dtype);
  if (dtype == DType::boolean) return *address ? 1.0 : 0.0;
  if (dtype == DType::float32) {
    std::uint32_t bits;
    std::memcpy(&bits, address, sizeof(bits));
    return decode(float32_format, bits);
  }
  std::uint16_t bits;
  std::memcpy(&bits, address, sizeof(bits));
  return decode(format_of(dtype), bits);
}

void write_element(void* data, DType dtype, std::int64_t index, double value) {
  char* address = static_cast<char*>(data) + index * element_size(dtype);
  if (dtype == DType::boolean) {
    *address = value != 0.0;
  } else if (dtype == DType::float32) {
    const std::uint32_t bits = encode(float32_format, value);
    std::memcpy(address, &bits, sizeof(bits));
  } else {
    const auto bits = static_cast<std::uint16_t>(encode(format_of(dtype), value));
    std::memcpy(address, &bits, sizeof(bits));
  }
}

bool has_codes(DType dtype) { return dtype == DType::int8 || dtype == DType::affine8 || dtype == DType::affine4; }

std::int32_t lowest_code(DType dtype) { return dtype == DType::int8 ? -127 : 0; }
std::int32_t highest_code(DType dtype) { return dtype == DType::int8 ? 127 : dtype == DType::affine8 ? 255 : 15; }

std::int64_t codes_of_group(DType dtype, std::int64_t dim) { return dtype == DType::int8 ? dim : quantization_group; }

std::int32_t read_code(const void* data, DType dtype, std::int64_t row, std::int64_t d) {
  if (dtype == DType::int8) return static_cast<const signed char*>(data)[row + d];
  const CodePlace place(dtype, row, d);
  return static_cast<std::int32_t>(word_at(data, place.word) >> place.shift & place.mask);
}

void write_code(void* data, DType dtype, std::int64_t row, std::int64_t d, std::int32_t code) {
  if (dtype == DType::int8) {
    static_cast<signed char*>(data)[row + d] = static_cast<signed char>(code);
    return;
  }
  const CodePlace place(dtype, row, d);
  const std::uint32_t others = word_at(data, place.word) & ~(place.mask << place.shift);
  const std::uint32_t word = others | static_cast<std::uint32_t>(code) << place.shift;
  std::memcpy(static_cast<char*>(data) + 4 * place.word, &word, sizeof(word));
}

double rounding_error(DType dtype, double value) {
  const Format format = format_of(dtype);
  return std::ldexp(0.5, exponent_of(format, std::abs(value)) - format.mantissa_bits);
}

}  // namespace flash_attn::test
