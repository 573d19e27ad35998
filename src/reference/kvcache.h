// Attention over a KV cache as MLX ops.
#pragma once

#include "ops/graph/kvcache_primitive.h"

namespace flash_attn::reference {

/// The call with every sequence's keys gathered from the cache into a dense tensor (batch, capacity, heads_k, dim).
AttentionCall gathered(const AttentionCall& call);

/// Attends; a gradient is refused, as the kernels refuse it.
AttentionOutputs attention_over_cache(const AttentionCall& call);

/// Appends to copies of the caches, then attends.
KVCacheOutputs attention_with_kvcache(const AttentionCall& call);

}  // namespace flash_attn::reference
