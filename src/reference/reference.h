// The truth: the same attention as a composition of MLX ops, differentiable by MLX, O(seqlen_q * seqlen_k) memory.
#pragma once

#include "ops/call/call.h"

namespace flash_attn::reference {

struct Result {
  mx::array out;  // q's dtype and shape, with head_dim_v
  mx::array lse;  // float32, (batch, heads, seqlen_q) or (heads, total_q)
  // q's dtype, (batch, heads, max_seqlen_q, max_seqlen_k): normalised, negative where dropped, 0 outside.
  mx::array probabilities;
};

/// Same results, masks and gradients as the kernels, computed in float32.
Result attention(const AttentionCall& call);

/// bool (batch, heads_q, rows, keys): which probabilities survive, bit for bit as the kernels draw them.
mx::array dropout_keep_mask(const AttentionProblem& problem, const mx::array& dropout_key, mx::Stream stream);

}  // namespace flash_attn::reference
