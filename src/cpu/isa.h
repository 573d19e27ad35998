// Which build of the kernels runs: the best ISA level of this machine, or the one that FLASH_ATTENTION_MLX_ISA names.
#pragma once

namespace flash_attn::cpu {

struct Kernels;

/// Levels that this machine can run, best first.
int isa_level_count();
const Kernels& isa_level(int index);
const char* isa_level_name(int index);

/// The level in use. FLASH_ATTENTION_MLX_ISA is read at every call; a level that the machine lacks throws
/// std::invalid_argument.
const Kernels& kernels();
const char* isa_level_name();

/// False when the machine lacks the level; nullptr restores the default.
bool force_isa_level_for_testing(const char* name);

}  // namespace flash_attn::cpu
