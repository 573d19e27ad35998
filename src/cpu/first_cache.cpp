#include "cpu/first_cache.h"

#include <unistd.h>

namespace flash_attn::cpu {

bool has_large_first_cache() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const bool is_large = sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 40 * 1024;
  return is_large;
#else
  return false;
#endif
}

}  // namespace flash_attn::cpu
