#include "cpu/read_ahead.h"

#include <unistd.h>

namespace flash_attn::cpu {
namespace {

// More than two cores have of a last-level cache. Systems tell that of several chips for one.
constexpr std::int64_t most_in_cache = 8 << 20;

bool has_large_l1() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const bool is_large = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 40 * 1024;
  return is_large;
#else
  return false;
#endif
}

}  // namespace

bool exceeds_caches(std::int64_t bytes) { return bytes > most_in_cache; }

ReadAhead read_ahead_of(std::int64_t bytes) {
  const bool from_memory = exceeds_caches(bytes);
  if (has_large_l1()) return from_memory ? ReadAhead::into_l1_from_memory : ReadAhead::into_l1;
  return from_memory ? ReadAhead::into_l2_from_memory : ReadAhead::into_l2;
}

}  // namespace flash_attn::cpu
