// What the CPU backend runs on.
#pragma once

#include <string>

namespace flash_attn {

/// The instruction-set level of the kernels in use: the best of this machine, or the one that FLASH_ATTENTION_MLX_ISA names.
std::string isa_level();

/// Threads that a call may use.
int num_threads();

}  // namespace flash_attn
