// `where` whose derivative is a `where` too.
#pragma once

#include <vector>

#include "mlx/mlx.h"

namespace flash_attn::reference {

namespace mx = mlx::core;

/// x where `condition`, else `other` (a constant). MLX's own derivative of `where` multiplies the cotangent by 0 or 1, and 0 *
/// NaN is NaN: here a cotangent that is not selected does not matter. x may be smaller than the condition.
inline mx::array select(const mx::array& condition, const mx::array& x, const mx::array& other) {
  const mx::array full_x = mx::broadcast_to(x, mx::broadcast_shapes(condition.shape(), x.shape()));
  const auto forward = [other](const std::vector<mx::array>& inputs) {
    return std::vector<mx::array>{mx::where(inputs[0], inputs[1], other)};
  };
  const auto backward = [](const std::vector<mx::array>& inputs, const std::vector<mx::array>& cotangents,
                           const std::vector<mx::array>&) {
    const mx::array zero(0, cotangents[0].dtype());
    return std::vector<mx::array>{mx::zeros_like(inputs[0]), mx::where(inputs[0], cotangents[0], zero)};
  };
  return mx::custom_vjp(forward, backward)({condition, full_x})[0];
}

}  // namespace flash_attn::reference
