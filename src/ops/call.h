// AttentionCall: a checked call, normalised so that one graph node, one reference and one vjp serve every public function.
#pragma once

#include <optional>
#include <vector>

#include "attention_problem.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace flash_attn {

namespace mx = mlx::core;

/// The optional arrays of a call. Order and presence are part of the node's identity; inputs.h lists those present
/// after q, k, v in this order.
struct OptionalInputs {
  std::optional<mx::array> attn_mask;       // 4-D, unexpanded: axes of 1 broadcast
  std::optional<mx::array> learnable_sink;  // float32 (heads_q,)
  std::optional<mx::array> alibi_slopes;    // float32 (heads_q,) or (batch, heads_q)
  std::optional<mx::array> cu_seqlens_q;    // int32 (batch + 1,)
  std::optional<mx::array> cu_seqlens_k;
  std::optional<mx::array> seqused_q;  // int32 (batch,)
  std::optional<mx::array> seqused_k;
  std::optional<mx::array> dropout_key;  // uint32 (2,)
};

struct AttentionCall {
  AttentionProblem problem;
  mx::array q, k, v;  // dense [batch, seq, heads, dim], varlen [total, heads, dim]; qv is already joined to q, and v to k
  OptionalInputs optional;
  mx::Stream stream;
};

}  // namespace flash_attn
