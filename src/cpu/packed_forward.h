// Forward of most units: their keys are packed once, for all their row tasks.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace flash_attn::cpu {

/// Query panels that share a task: enough to reuse a key block from L2, few enough to balance the threads.
constexpr std::int32_t panels_per_task = 4;

/// Units of one kv head each.
void forward_packed_units(const Kernels& level, const ForwardPass& pass, int threads, const std::vector<Unit>& units);

}  // namespace flash_attn::cpu
