#include "ops/graph/vjp.h"

#include "mlx/ops.h"

namespace flash_attn {
namespace {

/// Which gradient each of the node's inputs has, if any.
std::vector<std::optional<Differentiable>> differentiable_inputs(const AttentionCall& call) {
  std::vector<std::optional<Differentiable>> result = {wrt_q, wrt_k, wrt_v};
  for (const auto& [member, is_run, name] : optional_inputs) {
    const auto& array = call.optional.*member;
    if (!array) continue;
    if (member == &OptionalInputs::attn_mask && array->dtype() != mx::bool_) {
      result.emplace_back(wrt_attn_mask);
    } else if (member == &OptionalInputs::learnable_sink) {
      result.emplace_back(wrt_learnable_sink);
    } else {
      result.emplace_back(std::nullopt);
    }
  }
  return result;
}

}  // namespace

std::vector<mx::array> attention_vjp(const AttentionCall& call, const AttentionOutputs& outputs,
                                     const AttentionCotangents& cotangents, const std::vector<int>& argnums) {
  if (call.problem.cached) throw no_gradient_through_cache();
  const auto differentiable = differentiable_inputs(call);
  WantedGradients wanted;
  for (const int argnum : argnums) {
    if (const auto which = differentiable[argnum]) wanted.set(*which);
  }
  GradientSet gradients;
  if (wanted.any()) gradients = backward_node(call, outputs, cotangents, wanted);

  const std::vector<mx::array> inputs = node_inputs(call);
  std::vector<mx::array> result;
  for (const int argnum : argnums) {
    const mx::array& input = inputs[argnum];
    const auto which = differentiable[argnum];
    result.push_back(which ? mx::astype(*gradients[*which], input.dtype(), call.stream) : mx::zeros_like(input, call.stream));
  }
  return result;
}

NotImplementedError no_gradient_through_cache() {
  return NotImplementedError(
      "[flash_attn] attention over a KV cache or pages has no gradient; use flash_attn_func or flash_attn_varlen_func with k "
      "and v "
      "as tensors");
}

}  // namespace flash_attn
