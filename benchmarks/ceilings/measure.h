// Best of many short bursts on all threads: the machine may be shared, and a burst that nobody disturbed shows its limit.
#pragma once

#include <cstdint>
#include <vector>

#include "ceilings/level.h"

namespace flash_attn::ceilings {

/// The levels that this processor runs, best last.
std::vector<const Level*> runnable_levels();

double multiply_add_gflops(const Level& level, int threads);

struct ReadRate {
  double gigabytes_per_second;
  std::int64_t bytes;  // that the bursts walk through
};

/// Of memory, not of a cache: over 1 GiB or four times the last-level cache, whichever is more, within an eighth of the memory.
ReadRate memory_read_rate(const Level& level, int threads);

/// Of the last-level cache: every thread walks again and again through four times its L2.
ReadRate cache_read_rate(const Level& level, int threads);

}  // namespace flash_attn::ceilings
