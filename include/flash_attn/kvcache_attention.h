// Attention over a KV cache, contiguous or paged, with new keys appended in place: flash-attention's flash_attn_with_kvcache
// (v2), with the extras of v3.
//
// A cache changes in place. At the call the caller's array is made to refer to the result, so that whatever reads it from then
// on sees the new keys; at evaluation they are written into the same memory, unless somebody else still refers to the old
// contents (a slice taken before), which then costs one copy.
#pragma once

#include "flash_attn/attention.h"

namespace flash_attn {

/// k_cache or v_cache: the caller's own arrays.
///   q's dtype:    data (rows, capacity, heads_k, dim), or in pages (pages, page_size, heads_k, dim)
///   int8:         data int8 of that shape; scales float32 without its last axis: x = code * scale. On an x86-64 CPU, few
///                 16-bit queries and their probabilities are rounded to 15 bits of the largest before they meet it
///   MLX's triple: data uint32 (.., dim * bits / 32), scales and biases (.., dim / 64), as mx.quantize gives for 8 or 4 bits.
///                 Rounded alike in the avx512_bf16 and avx512_amx kernels
struct CacheRef {
  mx::array& data;
  mx::array* scales = nullptr;
  mx::array* biases = nullptr;
};

struct KVCacheArguments {
  std::optional<mx::array> k;  // (batch, seqlen_new, heads_k, head_dim), q's dtype: appended before attention
  std::optional<mx::array> v;
  std::optional<mx::array> rotary_cos;  // (rows, rotary_dim / 2), q's dtype, rows >= capacity: turns new keys and queries
  std::optional<mx::array> rotary_sin;
  bool rotary_interleaved = true;            // pairs (0, 1), (2, 3), ..; else (t, t + rotary_dim / 2)
  std::optional<mx::array> cache_seqlens;    // int32 (batch,): slots in use before the append; none: all
  std::optional<mx::array> cache_batch_idx;  // int32 (batch,): row of the cache, or of block_table
  std::optional<mx::array> cache_leftpad;    // int32 (batch,): slots before a sequence's first key
  // ---- extras of v3
  std::optional<mx::array> cu_seqlens_q;  // int32 (batch + 1,): q is packed, (total_q, heads, head_dim)
  std::optional<int> max_seqlen_q;
  std::optional<mx::array> cu_seqlens_k_new;  // int32 (batch + 1,): k and v are packed, (total_new, heads_k, dim)
  std::optional<mx::array> rotary_seqlens;  // int32 (batch,): rotary position of the first new token, in place of cache_seqlens
};

/// Appends k and v to the caches, then attends q over all that each sequence holds; causal, windows and ALiBi are aligned to
/// its end. q (batch, seqlen_q, heads, head_dim). `options.block_table` makes the caches paged; dropout, attn_mask and seqused
/// do not go with a cache. S_dmask of the result is empty. No gradient: NotImplementedError.
AttentionResult flash_attn_with_kvcache(const mx::array& q, const CacheRef& k_cache, const CacheRef& v_cache,
                                        const KVCacheArguments& arguments = {}, const AttentionOptions& options = {});

/// Writes new_k, new_v (batch, seqlen_new, heads_k, dim) behind cache_seqlens int32 (batch,); gives the new lengths.
mx::array update_paged_kv_cache(const CacheRef& k_cache, const CacheRef& v_cache, const mx::array& new_k,
                                const mx::array& new_v, const mx::array& block_table, const mx::array& cache_seqlens,
                                mx::StreamOrDevice stream = {});

/// Evaluates block_table and cache_seqlens, and throws what flash_attn_with_kvcache would throw for them and `seqlen_new`
/// tokens.
void validate_paged_kv_params(const mx::array& k_cache, const mx::array& v_cache, const mx::array& block_table,
                              const mx::array& cache_seqlens, int seqlen_new = 0);

}  // namespace flash_attn
