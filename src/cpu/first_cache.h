// How large the processor's first-level cache is, where that decides what a kernel does.
#pragma once

namespace flash_attn::cpu {

/// Of at least 40 KiB for data: Intel since Ice Lake, AMD since Zen 5. False where the system does not tell.
bool has_large_first_cache();

}  // namespace flash_attn::cpu
