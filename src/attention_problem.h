// AttentionProblem: the one description of a call that every backend takes. Shapes and features, no data.
#pragma once

#include <cstdint>

#include "semantics/mask.h"

namespace flash_attn {

// Of the elements that a kernel reads. affine8 and affine4 are MLX's quantised form: 32-bit words of codes, little-endian.
enum class DType : std::uint8_t { float32, bfloat16, float16, boolean, int8, affine8, affine4 };

// Codes of MLX's quantised form that share a scale and a bias.
constexpr std::int32_t quantization_group = 64;

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

  // Keys in a cache: k [cache_rows, max_seqlen_k, heads_k, head_dim], or in pages [cache_rows, page_size, heads_k, head_dim]
  // that a table [table_rows, table_blocks] lists. Only q may then be packed.
  bool cached = false;
  std::int32_t cache_rows = 0;
  std::int32_t page_size = 0;  // 0: not paged
  std::int32_t table_rows = 0;
  std::int32_t table_blocks = 0;
  std::int32_t seqlen_new = 0;  // keys appended to each sequence before attention
  std::int32_t total_new = 0;   // of all sequences, where new keys are packed
  bool has_qv = false;          // the score is q.k + qv.v

  std::int32_t rotary_dim = 0;  // leading dims of q and k that are rotated; 0: none
  bool rotary_interleaved = true;
  std::int32_t rotary_rows = 0;  // of the table of angles

  float softmax_scale = 1.0f;
  float softcap = 0.0f;  // 0: off
  bool causal = false;
  std::int32_t window_left = -1;  // negative: unbounded
  std::int32_t window_right = -1;
  std::int32_t attention_chunk = 0;  // 0: off

  bool has_dropout = false;
  std::uint32_t dropout_keep_24 = 1u << 24;  // floor(2^24 (1 - dropout_p))
  float dropout_scale = 1.0f;                // 1 / (1 - dropout_p)

  std::int32_t num_splits = 0;  // of a long sequence of keys, over which few rows are spread; 0: by shape

  std::int32_t group() const { return heads_q / heads_k; }
  std::int32_t scored_dims() const { return head_dim + (has_qv ? head_dim_v : 0); }

  // Keys that a sequence in a cache can have.
  std::int32_t key_capacity() const {
    const std::int64_t slots = std::int64_t{table_blocks} * page_size;
    return page_size > 0 && slots < max_seqlen_k ? static_cast<std::int32_t>(slots) : max_seqlen_k;
  }

  MaskRule mask_rule(std::int32_t seqlen_q, std::int32_t seqlen_k) const {
    return {seqlen_q, seqlen_k, window_left, causal_window_right(causal, window_right), attention_chunk};
  }

  bool operator==(const AttentionProblem&) const = default;
};

}  // namespace flash_attn
