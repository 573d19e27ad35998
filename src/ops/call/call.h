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

  // Keys in a cache. int8: scales float32, k's shape without its last axis. MLX's triple: scales and biases per group.
  std::optional<mx::array> k_scales, k_biases, v_scales, v_biases;
  std::optional<mx::array> qv;                      // q's shape with head_dim_v; elsewhere qv is joined to q
  std::optional<mx::array> block_table;             // int32 (table rows, blocks)
  std::optional<mx::array> cache_batch_idx;         // int32 (batch,)
  std::optional<mx::array> cache_leftpad;           // int32 (batch,)
  std::optional<mx::array> k_new, v_new;            // (batch, seqlen_new, heads_k, dim), or packed (total_new, heads_k, dim)
  std::optional<mx::array> cu_seqlens_k_new;        // int32 (batch + 1,)
  std::optional<mx::array> rotary_cos, rotary_sin;  // (rows, rotary_dim / 2)
  std::optional<mx::array> rotary_seqlens;          // int32 (batch,)
};

struct AttentionCall {
  AttentionProblem problem;
  mx::array q, k, v;  // dense [batch, seq, heads, dim], varlen [total, heads, dim]; qv is already joined to q, and v to k.
                      // Cached: k and v [rows or pages, seq, heads, dim], codes where they are quantised
  OptionalInputs optional;
  mx::Stream stream;
};

}  // namespace flash_attn
