// Which instance of the decode kernel suits this machine's caches and the size of what is read.
#pragma once

#include <cstdint>

namespace flash_attn::cpu {

// Into L1 where that has 40 KiB or more for data (Intel since Ice Lake, AMD since Zen 5); from memory what is too large for
// caches.
enum class ReadAhead : std::uint8_t { into_l2, into_l2_from_memory, into_l1, into_l1_from_memory };

/// Whether so many bytes come from memory.
bool exceeds_caches(std::int64_t bytes);

/// For so many bytes of keys and values. An L1 that the system does not tell of counts as small.
ReadAhead read_ahead_of(std::int64_t bytes);

}  // namespace flash_attn::cpu
