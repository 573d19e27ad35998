// One parallel_for for the process. The caller works too, so a region never waits for a worker that has not woken up. Idle
// workers sleep, but for a tenth of a millisecond after a region, since the next one often follows soon; even then they give
// way to a busy neighbour. Safe from several threads at once, nested, and after fork.
#pragma once

#include <cstdint>

namespace flash_attn::cpu {

/// Threads a region may use: FLASH_ATTENTION_MLX_THREADS (read at every call), else the CPUs that affinity and cgroup leave us.
int thread_count();

/// 0 restores the default.
void set_thread_count_for_testing(int threads);

/// What a region takes one thread, roughly. For less than `short_region` no sleeping worker is woken: its caller would be done
/// before.
using Nanoseconds = std::int64_t;
constexpr Nanoseconds short_region = 60'000;

/// Runs body(context, task, slot) for every task in [0, count), in ascending order of start. `slot` in [0, threads) is unique
/// among the threads inside this region: an index for scratch memory. What a task throws is thrown here, after every thread
/// has left the region; tasks that had not started are then left out.
void run_tasks(std::int64_t count, int threads, Nanoseconds work, void (*body)(void* context, std::int64_t task, int slot),
               void* context);

template <class Body>
static inline void parallel_for(std::int64_t count, int threads, Nanoseconds work, Body body) {
  run_tasks(
      count, threads, work, [](void* context, std::int64_t task, int slot) { (*static_cast<Body*>(context))(task, slot); },
      &body);
}

template <class Body>
static inline void parallel_for(std::int64_t count, int threads, Body body) {
  parallel_for(count, threads, short_region, body);
}

template <class Body>
static inline void parallel_for(std::int64_t count, Body body) {
  parallel_for(count, thread_count(), body);
}

}  // namespace flash_attn::cpu
