// Whether this process may multiply in AMX tiles.
#pragma once

namespace flash_attn::cpu {

/// The chip has AMX for bfloat16, and the kernel lets this process use it: tile registers are so large that Linux hands them
/// out on request, which this is. False anywhere but on Linux, x86-64.
bool has_matrix_unit();

}  // namespace flash_attn::cpu
