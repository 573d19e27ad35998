// flash-attention's functions on MLX arrays. Semantics follow flash-attention v2 (Dao-AILab/flash-attention,
// flash_attn_interface.py); extras are those of v3 and v4.
//
// Everything is lazy: a call checks its arguments and adds nodes to MLX's graph. All functions are differentiable in q, k, v,
// attn_mask and learnable_sink, through out and through lse.
//
// Errors are raised at the call: std::invalid_argument (ValueError) for shapes and values, flash_attn::TypeError for dtypes,
// flash_attn::NotImplementedError for what no backend does; each names the argument, what it got and what it needs.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "mlx/array.h"
#include "mlx/utils.h"

namespace flash_attn {

namespace mx = mlx::core;

struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct NotImplementedError : std::logic_error {
  using std::logic_error::logic_error;
};

/// Options of every function, upstream's names and defaults; below the line, extras.
struct AttentionOptions {
  double dropout_p = 0.0;               // [0, 1); each probability is dropped with this chance, the rest scaled by 1 / (1 - p)
  std::optional<double> softmax_scale;  // default head_dim^-0.5; with qv (head_dim + head_dim_v)^-0.5
  bool causal = false;                  // aligned bottom-right: the last query sees every key
  std::pair<int, int> window_size = {-1, -1};  // keys left and right of the diagonal; negative: unbounded
  double softcap = 0.0;                        // scores become softcap * tanh(score / softcap); 0: off
  std::optional<mx::array> alibi_slopes;       // float32 (heads,) or (batch, heads)
  bool deterministic = false;                  // accepted; the backward always is
  bool return_attn_probs = false;              // also give S_dmask
  // ---- extras
  std::optional<mx::array> learnable_sink;  // (heads,): exp(sink) joins the denominator
  std::optional<mx::array> attn_mask;       // bool (true: visible) or floating (added), broadcastable to
                                            // (batch, heads, seqlen_q, seqlen_k); varlen: max_seqlen_q, max_seqlen_k
  std::optional<mx::array> qv;              // (..., heads, head_dim_v): score = scale * (q.k + qv.v)
  int attention_chunk = 0;                  // keys are visible in the query's own chunk only; 0: off
  std::optional<mx::array> seqused_q;       // int32 (batch,): tokens in use of each sequence
  std::optional<mx::array> seqused_k;
  std::optional<mx::array> dropout_key;  // uint32 (2,), as mlx::core::random::key gives; needed when dropout_p > 0
  int num_splits = 0;                    // of the keys, where few queries are spread over many; 0: chosen by shape
  std::optional<mx::array>
      block_table;                  // int32 (batch, blocks): k and v are pages (pages, page_size, heads_k, dim); no gradient
  bool return_softmax_lse = false;  // lse will be read: never routed to MLX's SDPA, which has none
  mx::StreamOrDevice stream = {};
};

/// Where a call goes, and why: "kernel" (ours), "sdpa" (mlx::core::fast) or "reference" (MLX ops).
struct Route {
  enum class Target { kernel, sdpa, reference };
  Target target;
  std::string why;
};

struct AttentionResult {
  mx::array out;      // q's shape with head_dim_v, q's dtype
  mx::array lse;      // float32, natural log, before dropout: (batch, heads, seqlen_q), varlen (heads, total_q)
  mx::array S_dmask;  // probabilities, negative where dropped, (batch, heads, seqlen_q, seqlen_k); shape (0,) when dropout_p is
                      // 0 or return_attn_probs is false
  Route route;
};

/// q (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_k, head_dim), v (batch, seqlen_k, heads_k, head_dim_v);
/// float32, bfloat16 or float16, all the same; heads a multiple of heads_k; head dims 1 to 576.
AttentionResult flash_attn_func(const mx::array& q, const mx::array& k, const mx::array& v,
                                const AttentionOptions& options = {});

/// qkv (batch, seqlen, 3, heads, head_dim). Reads the three as views, without a copy.
AttentionResult flash_attn_qkvpacked_func(const mx::array& qkv, const AttentionOptions& options = {});

/// q (batch, seqlen_q, heads, head_dim), kv (batch, seqlen_k, 2, heads_k, head_dim).
AttentionResult flash_attn_kvpacked_func(const mx::array& q, const mx::array& kv, const AttentionOptions& options = {});

/// Sequences of different lengths, packed: q (total_q, heads, head_dim), k and v (total_k, heads_k, ..); sequence b owns rows
/// [cu_seqlens[b], cu_seqlens[b + 1]), cu_seqlens int32 (batch + 1,). max_seqlen bounds every length.
AttentionResult flash_attn_varlen_func(const mx::array& q, const mx::array& k, const mx::array& v,
                                       const mx::array& cu_seqlens_q, const mx::array& cu_seqlens_k, int max_seqlen_q,
                                       int max_seqlen_k, const AttentionOptions& options = {});

/// qkv (total, 3, heads, head_dim).
AttentionResult flash_attn_varlen_qkvpacked_func(const mx::array& qkv, const mx::array& cu_seqlens, int max_seqlen,
                                                 const AttentionOptions& options = {});

/// q (total_q, heads, head_dim), kv (total_k, 2, heads_k, head_dim).
AttentionResult flash_attn_varlen_kvpacked_func(const mx::array& q, const mx::array& kv, const mx::array& cu_seqlens_q,
                                                const mx::array& cu_seqlens_k, int max_seqlen_q, int max_seqlen_k,
                                                const AttentionOptions& options = {});

/// Merges results over disjoint keys: out_partial (splits, batch, seqlen, heads, dim) float32, lse_partial (splits, batch,
/// seqlen, heads) float32 -> out (batch, seqlen, heads, dim) in `out_dtype` (default float32), lse (batch, seqlen, heads).
/// flash-attention v3's flash_attn_combine.
std::pair<mx::array, mx::array> flash_attn_combine(const mx::array& out_partial, const mx::array& lse_partial,
                                                   std::optional<mx::Dtype> out_dtype = std::nullopt,
                                                   mx::StreamOrDevice stream = {});

/// Where a call would go.
Route route(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options = {});

/// Whether mlx::core::fast::scaled_dot_product_attention could compute this call with the same meaning, on any backend.
bool can_use_mlx_sdpa(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options = {});

}  // namespace flash_attn
