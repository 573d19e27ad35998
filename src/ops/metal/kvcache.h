// A cache on Metal: MLX's own nodes write new keys in place, then the kernels attend.
#pragma once

#include "ops/graph/kvcache_primitive.h"

namespace flash_attn {

KVCacheOutputs metal_kvcache(const AttentionCall& call);

/// Attention of few rows over many keys in a cache, divided into splits. Arrays as readable_by_metal leaves them.
AttentionOutputs metal_decode(const AttentionCall& call);

}  // namespace flash_attn
