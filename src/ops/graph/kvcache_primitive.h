// The graph node that appends to a cache and attends over it.
#pragma once

#include <vector>

#include "ops/graph/primitive.h"

namespace flash_attn {

struct KVCacheOutputs {
  AttentionOutputs attention;
  std::vector<mx::array> cache;  // cache_arrays(call), with the new keys in them
};

/// The arrays of a call that an append changes: k and v, each with its scales and biases if it has them.
std::vector<mx::array> cache_arrays(const AttentionCall& call);

/// One node, so that the next append depends on this read: the cache is then free to be written in place however many steps
/// wait for their evaluation.
KVCacheOutputs kvcache_node(const AttentionCall& call);

}  // namespace flash_attn
