// The vector-Jacobian product of attention, whatever node computed it.
#pragma once

#include <vector>

#include "flash_attn/attention.h"
#include "ops/graph/primitive.h"

namespace flash_attn {

/// Gradients with respect to node_inputs(call)[argnums], in that order. Zeros for what has none: bool masks, slopes, lengths,
/// keys.
std::vector<mx::array> attention_vjp(const AttentionCall& call, const AttentionOutputs& outputs,
                                     const AttentionCotangents& cotangents, const std::vector<int>& argnums);

/// For every route.
NotImplementedError no_gradient_through_cache();

}  // namespace flash_attn
