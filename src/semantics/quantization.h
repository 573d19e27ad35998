// Quantised keys and values: int8 with a scale per row of a head, or MLX's affine codes with a scale and a bias per group.
//
// T is float, or a backend's vector of floats.
#pragma once

#include "semantics/portable.h"

namespace flash_attn {

/// The scale of a row whose largest magnitude is `largest`: x = code * scale, codes -127 to 127.
FA_FN float int8_scale(float largest) { return largest / 127.0f; }

struct AffineScale {
  float scale;
  float bias;
};

/// Scale and bias of a group, as mx.quantize chooses them: the end of larger magnitude is a code exactly.
FA_FN AffineScale affine_scale(float lowest, float highest, int32 largest_code) {
  const float smallest_scale = 1e-7f;
  const bool from_below = (lowest < 0.0f ? -lowest : lowest) > (highest < 0.0f ? -highest : highest);
  float scale = (highest - lowest) / static_cast<float>(largest_code);
  scale = scale > smallest_scale ? scale : smallest_scale;
  scale = from_below ? scale : -scale;
  const float edge = from_below ? lowest : highest;
  const float code = ScalarWords::round(edge / scale);
  if (code == 0.0f) return {scale, 0.0f};
  return {edge / code, edge};
}

/// x of a code.
template <class T>
FA_FN T dequantized(T code, T scale, T bias) {
  return code * scale + bias;
}

}  // namespace flash_attn
