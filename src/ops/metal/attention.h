// Attention and its gradients by the Metal kernels.
#pragma once

#include "metal/specialisation.h"
#include "ops/graph/primitive.h"
#include "ops/metal/launch.h"

namespace flash_attn {

AttentionOutputs metal_attention(const AttentionCall& call);

GradientSet metal_backward(const AttentionCall& call, const AttentionOutputs& outputs, const AttentionCotangents& cotangents,
                           WantedGradients wanted);

/// The call's arrays as the kernels name and type them, in the order of node_inputs.
metal::Operands metal_operands(const AttentionCall& call);

/// The call with arrays that kernels can read: vectors as plain runs, tensors with whole rows.
AttentionCall readable_by_metal(AttentionCall call);

metal::Gpu metal_gpu();

}  // namespace flash_attn
