// Checks of a call whose keys lie in a cache or in pages.
#pragma once

#include "flash_attn/kvcache_attention.h"
#include "ops/call/call.h"
#include "ops/call/check.h"

namespace flash_attn {

/// Rank, dtype and sizes of q and of k and v, which `optional`'s scales and biases may make quantised ones.
void check_cached_tensors(const mx::array& q, const mx::array& k, const mx::array& v, const OptionalInputs& optional,
                          bool varlen, const ArgumentNames& names);

/// Shape and dtype of what says where the keys lie: block_table, cache_batch_idx, cache_leftpad and their lengths.
void check_cache_layout(const AttentionProblem& problem, const OptionalInputs& optional, const char* lengths_name);

/// New keys and the rotary table.
void check_new_keys(const AttentionProblem& problem, const mx::array& q, const OptionalInputs& optional,
                    const ArgumentNames& names);

/// The values of all of these, where that forces no evaluation.
void check_cache_values(const AttentionProblem& problem, const OptionalInputs& optional, const char* lengths_name);

/// Pages and what leads to them, without a call: `seqlen_new` tokens are to be appended to each sequence.
void check_pages(const mx::array& k_cache, const mx::array& v_cache, const mx::array& block_table,
                 const mx::array& cache_seqlens, int seqlen_new);

}  // namespace flash_attn
