// The gradient of an additive attn_mask, in the mask's own broadcast shape.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/unit.h"

namespace flash_attn::cpu {

/// Fills pass.gradients->dmask. Sums run over batch, heads, row blocks and key blocks in ascending order, for any thread count.
void mask_gradient(const Kernels& level, const BackwardPass& pass, int threads, const std::vector<Sequence>& sequences);

}  // namespace flash_attn::cpu
