// From what a caller may say to the one form that everything below understands, checked.
#pragma once

#include "flash_attn/kvcache_attention.h"
#include "ops/call/call.h"
#include "ops/call/check.h"

namespace flash_attn {

AttentionCall dense_call(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options,
                         const ArgumentNames& names = {});

AttentionCall varlen_call(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& cu_seqlens_q,
                          const mx::array& cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, const AttentionOptions& options,
                          const ArgumentNames& names = {});

AttentionCall kvcache_call(const mx::array& q, const CacheRef& k_cache, const CacheRef& v_cache,
                           const KVCacheArguments& arguments, const AttentionOptions& options, ArgumentNames names = {});

/// Part `index` along the third last axis of qkv or kv: a view.
mx::array unpack(const mx::array& packed, int index, mx::Stream stream);

}  // namespace flash_attn
