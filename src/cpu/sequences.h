// The sequences of a call and the units of work they make.
#pragma once

#include <vector>

#include "cpu/attention.h"
#include "cpu/unit.h"

namespace flash_attn::cpu {

/// One per batch item: cut to what exists, whatever cu_seqlens and seqused hold.
std::vector<Sequence> sequences_of(const AttentionProblem& problem, const AttentionInputs& inputs);

/// One per (batch, kv head), kv heads of a batch item side by side.
std::vector<Unit> units_of(const AttentionProblem& problem, const std::vector<Sequence>& sequences);

}  // namespace flash_attn::cpu
