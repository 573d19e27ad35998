// Best of many short bursts on all threads: the machine may be shared, and a burst that nobody disturbed shows its limit.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "ceilings/level.h"

namespace flash_attn::ceilings {

/// The levels that this processor runs, best last.
std::vector<const Level*> runnable_levels();

double multiply_add_gflops(const Level& level, int threads);

/// Memory that several threads read a part of in each burst, so that all the others lie between two reads of one.
class ReadWalk {
 public:
  ReadWalk(const Level& level, int threads, std::int64_t burst_bytes, int parts);
  double best_gigabytes_per_second(int bursts);
  std::int64_t bytes() const { return share_ * threads_ * parts_ * static_cast<std::int64_t>(sizeof(float)); }

 private:
  const Level& level_;
  int threads_;
  std::int64_t share_;  // floats of a thread in a burst
  int parts_;
  int next_ = 0;
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> data_;  // begins at a cache line
};

struct ReadRate {
  double gigabytes_per_second;
  std::int64_t bytes;  // that the bursts walk through
};

/// Of memory, not of a cache: over 1 GiB or four times the last-level cache, whichever is more, within an eighth of the memory.
ReadRate memory_read_rate(const Level& level, int threads);

/// What that walks through, in bursts of so many bytes.
ReadWalk memory_walk(const Level& level, int threads, std::int64_t burst_bytes);

/// Of the last-level cache: every thread walks again and again through four times its L2.
ReadRate cache_read_rate(const Level& level, int threads);

}  // namespace flash_attn::ceilings
