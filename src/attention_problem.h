// AttentionProblem: the one description of a call that every backend takes. Shapes and features, no data.
#pragma once

#include <cstdint>

#include "semantics/mask.h"

namespace flash_attn {

enum class DType : std::uint8_t { float32, bfloat16, float16, boolean };

// The largest q, k or v head dim; with qv, q and k grow by v's.
constexpr std::int32_t max_head_dim_of_tensor = 576;
constexpr std::int32_t max_head_dim = 2 * max_head_dim_of_tensor;

struct AttentionProblem {
  DType dtype = DType::float32;  // of q, k, v and out; all arithmetic is float32

  // q [batch, max_seqlen_q, heads_q, head_dim]   k [batch, max_seqlen_k, heads_k, head_dim]   v [.., head_dim_v]
  // varlen: q [total_q, heads_q, head_dim]       k [total_k, heads_k, head_dim]               v [.., head_dim_v]
  std::int32_t batch = 0;
  std::int32_t heads_q = 0;
  std::int32_t heads_k = 0;  // divides heads_q; query head h reads kv head h / (heads_q / heads_k)
  std::int32_t head_dim = 0;
  std::int32_t head_dim_v = 0;
  std::int32_t max_seqlen_q = 0;
  std::int32_t max_seqlen_k = 0;
  bool varlen = false;
  std::int32_t total_q = 0;  // varlen only
  std::int32_t total_k = 0;

  float softmax_scale = 1.0f;
  float softcap = 0.0f;  // 0: off
  bool causal = false;
  std::int32_t window_left = -1;  // negative: unbounded
  std::int32_t window_right = -1;
  std::int32_t attention_chunk = 0;  // 0: off

  bool has_dropout = false;
  std::uint32_t dropout_keep_24 = 1u << 24;  // floor(2^24 (1 - dropout_p))
  float dropout_scale = 1.0f;                // 1 / (1 - dropout_p)

  std::int32_t group() const { return heads_q / heads_k; }

  MaskRule mask_rule(std::int32_t seqlen_q, std::int32_t seqlen_k) const {
    return {seqlen_q, seqlen_k, window_left, causal_window_right(causal, window_right), attention_chunk};
  }

  bool operator==(const AttentionProblem&) const = default;
};

}  // namespace flash_attn
