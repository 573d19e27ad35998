// Merging partial results by their LSE: out = sum_i softmax_i(lse_i) out_i. MLX ops, so that MLX differentiates it.
#include <limits>

#include "flash_attn/attention.h"
#include "mlx/ops.h"
#include "ops/call/check.h"

namespace flash_attn {

std::pair<mx::array, mx::array> flash_attn_combine(const mx::array& out_partial, const mx::array& lse_partial,
                                                   std::optional<mx::Dtype> out_dtype, mx::StreamOrDevice stream) {
  check_partials(out_partial, lse_partial, out_dtype);
  constexpr int splits = 0;
  const mx::array minus_infinity(-std::numeric_limits<float>::infinity());
  const mx::array zero(0.0f);

  // Where every split is empty the maximum is -inf: 0 stands in for it, since -inf - -inf is NaN, in the gradient as well.
  const mx::array maximum = mx::stop_gradient(mx::max(lse_partial, splits, /*keepdims=*/true, stream), stream);
  const mx::array nothing = mx::equal(maximum, minus_infinity, stream);
  const mx::array reference = mx::where(nothing, zero, maximum, stream);
  const mx::array present = mx::greater(lse_partial, minus_infinity, stream);
  const mx::array shifted = mx::subtract(mx::where(present, lse_partial, reference, stream), reference, stream);
  const mx::array weights = mx::where(present, mx::exp(shifted, stream), zero, stream);
  const mx::array total = mx::sum(weights, splits, /*keepdims=*/true, stream);
  const mx::array safe_total = mx::where(nothing, mx::array(1.0f), total, stream);
  const mx::array lse = mx::where(nothing, minus_infinity, mx::add(reference, mx::log(safe_total, stream), stream), stream);

  // An empty split may hold anything.
  const mx::array shares = mx::expand_dims(mx::divide(weights, safe_total, stream), -1, stream);
  const mx::array partials =
      mx::where(mx::expand_dims(present, -1, stream), mx::astype(out_partial, mx::float32, stream), zero, stream);
  const mx::array out = mx::sum(mx::multiply(shares, partials, stream), splits, /*keepdims=*/false, stream);
  return {mx::astype(out, out_dtype.value_or(mx::float32), stream), mx::squeeze(lse, splits, stream)};
}

}  // namespace flash_attn
