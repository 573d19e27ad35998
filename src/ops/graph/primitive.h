// The graph nodes: FlashAttention gives out and lse, FlashAttentionVJP the gradients. Both hold an AttentionProblem and which
// optional arrays they have; the arrays are the node's inputs.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "mlx/primitives.h"
#include "ops/call/call.h"
#include "ops/call/inputs.h"

namespace flash_attn {

struct AttentionOutputs {
  mx::array out;
  mx::array lse;
};

/// One of the two is zeros where only the other is differentiated.
struct AttentionCotangents {
  mx::array dout;
  mx::array dlse;
};

/// The inputs that have gradients, as positions in GradientSet.
enum Differentiable : std::size_t { wrt_q, wrt_k, wrt_v, wrt_attn_mask, wrt_learnable_sink, differentiable_count };
using WantedGradients = std::bitset<differentiable_count>;
using GradientSet = std::array<std::optional<mx::array>, differentiable_count>;

/// out and lse by the backend's forward kernel.
AttentionOutputs attention_node(const AttentionCall& call);

/// The wanted gradients by the backend's backward kernel: dq, dk, dv in q's dtype, the others in float32.
GradientSet backward_node(const AttentionCall& call, const AttentionOutputs& outputs, const AttentionCotangents& cotangents,
                          WantedGradients wanted);

}  // namespace flash_attn
