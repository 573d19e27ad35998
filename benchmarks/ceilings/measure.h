// Best of many short bursts on all threads: the machine may be shared, and a burst that nobody disturbed shows its limit.
#pragma once

#include <vector>

#include "ceilings/level.h"

namespace flash_attn::ceilings {

/// The levels that this processor runs, best last.
std::vector<const Level*> runnable_levels();

double multiply_add_gflops(const Level& level, int threads);
double read_gigabytes_per_second(const Level& level, int threads);

}  // namespace flash_attn::ceilings
