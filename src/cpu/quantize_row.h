// A float32 row to the codes of a quantised cache.
#pragma once

#include "cpu/convert.h"
#include "semantics/quantization.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// NaN becomes 0.
inline int nearest_code(float x, int lowest, int highest) {
  const float code = __builtin_rintf(x);
  if (!(code > static_cast<float>(lowest))) return code == code ? lowest : 0;
  return code < static_cast<float>(highest) ? static_cast<int>(code) : highest;
}

// codes[dim], one byte each; gives the scale.
inline float quantize_int8(const float* row, int dim, char* codes) {
  float largest = 0.0f;
  for (int d = 0; d < dim; ++d) largest = __builtin_fabsf(row[d]) > largest ? __builtin_fabsf(row[d]) : largest;
  const float scale = int8_scale(largest);
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int d = 0; d < dim; ++d) codes[d] = static_cast<char>(nearest_code(row[d] * inverse, -127, 127));
  return scale;
}

// codes [dim * bits / 8 bytes], lowest bits first; a scale and a bias per group.
inline void quantize_affine(const float* row, int dim, int bits, char* codes, float* scales, float* biases) {
  const int largest_code = (1 << bits) - 1;
  for (int first = 0; first < dim; first += quantization_group) {
    float lowest = row[first];
    float highest = row[first];
    for (int d = first; d < first + quantization_group; ++d) {
      lowest = row[d] < lowest ? row[d] : lowest;
      highest = row[d] > highest ? row[d] : highest;
    }
    const AffineScale affine = affine_scale(lowest, highest, largest_code);
    *scales++ = affine.scale;
    *biases++ = affine.bias;
    const auto code = [&](int d) { return nearest_code((row[d] - affine.bias) / affine.scale, 0, largest_code); };
    for (int d = first; d < first + quantization_group; d += 8 / bits) {
      *codes++ = static_cast<char>(bits == 8 ? code(d) : code(d) | code(d + 1) << 4);
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
