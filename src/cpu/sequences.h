// The sequences of a call and the units of work they make.
#pragma once

#include <functional>
#include <vector>

#include "cpu/attention.h"
#include "cpu/unit.h"

namespace flash_attn::cpu {

/// One per batch item: cut to what exists, whatever cu_seqlens and seqused hold.
std::vector<Sequence> sequences_of(const AttentionProblem& problem, const AttentionInputs& inputs);

/// The row of the cache, or of the block table, that a sequence has; negative when what cache_batch_idx says is not there.
std::int32_t cache_row_of(const AttentionProblem& problem, const AttentionInputs& inputs, std::int32_t batch);

/// Slots that a sequence fills in its cache before new keys are appended, leftpad included; not above the capacity.
std::int32_t keys_in_cache(const AttentionProblem& problem, const AttentionInputs& inputs, std::int32_t batch);

/// Where a sequence's new keys lie in NewKeys; `begin` is 0 when they are not packed.
Extent new_keys_of(const AttentionProblem& problem, const AttentionInputs& inputs, std::int32_t batch);

/// One per (batch, kv head), kv heads of a batch item side by side.
std::vector<Unit> units_of(const AttentionProblem& problem, const std::vector<Sequence>& sequences);

enum class Side { q, k };

/// Calls visit(batch, row) for the rows of q or k that belong to no sequence: they exist when a call is varlen or has seqused.
/// The batch is 0 when varlen.
void for_each_unused_row(const AttentionProblem& problem, const std::vector<Sequence>& sequences, Side side,
                         const std::function<void(std::int64_t batch, std::int64_t row)>& visit);

/// Zeros one row of a tensor, all its heads.
void zero_row(const Tensor& tensor, std::int64_t batch, std::int64_t row, std::int64_t heads, std::int64_t dim);

}  // namespace flash_attn::cpu
