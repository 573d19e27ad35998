// Forward of sequences with few queries: the keys are spread over the threads, and read in place.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace flash_attn::cpu {

/// True when packing the sequence's keys would cost more than it saves.
bool suits_decode(const AttentionProblem& problem, const AttentionInputs& inputs, const Sequence& sequence);

/// Those of `sequences` that suit.
void decode_sequences(const Kernels& level, const DecodePass& call, int threads, std::vector<Sequence> sequences);

}  // namespace flash_attn::cpu
