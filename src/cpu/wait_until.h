// For what another thread is at work on: it comes within microseconds, so nobody sleeps.
#pragma once

#include <sched.h>

namespace flash_attn::cpu {

template <class Condition>
static inline void wait_until(Condition condition) {
  for (int spins = 0; !condition(); ++spins) {
    if (spins > 100) sched_yield();
  }
}

}  // namespace flash_attn::cpu
