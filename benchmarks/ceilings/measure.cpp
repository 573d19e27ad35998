#include "ceilings/measure.h"

#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <thread>

#include "cpu/matrix_unit.h"

namespace flash_attn::ceilings {
namespace {

double seconds_now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Keeps the calling thread on the allowed CPU of this number, if the system has such a thing: left to itself, Linux may have
/// two new threads share one CPU for longer than a measurement takes.
void stay_on_cpu(int number) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  number %= CPU_COUNT(&allowed);
  int cpu = 0;
  while (!CPU_ISSET(cpu, &allowed) || number-- > 0) ++cpu;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  sched_setaffinity(0, sizeof one, &one);
#else
  static_cast<void>(number);
#endif
}

/// Largest work / seconds of `bursts`, all threads starting each together; `burst(thread, i)` returns the work it did.
template <class Burst>
double best_rate(int threads, int bursts, Burst burst) {
  double best = 0.0;
  double started = 0.0;
  std::vector<double> work(threads);
  std::barrier start(threads, [&]() noexcept { started = seconds_now(); });
  std::barrier finish(threads, [&]() noexcept {
    double total = 0.0;
    for (double w : work) total += w;
    best = std::max(best, total / (seconds_now() - started));
  });
  auto run = [&](int thread) {
    for (int i = 0; i < bursts; ++i) {
      start.arrive_and_wait();
      work[thread] = burst(thread, i);
      finish.arrive_and_wait();
    }
  };
  std::vector<std::jthread> workers;
  for (int thread = 0; thread < threads; ++thread) {
    workers.emplace_back([&, thread] {
      stay_on_cpu(thread);
      run(thread);
    });
  }
  workers.clear();
  return best;
}

struct FreeMemory {
  void operator()(float* data) const { std::free(data); }
};

/// 0 where the system does not tell.
std::int64_t last_level_cache_bytes() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  return std::max<std::int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
#else
  return 0;
#endif
}

std::int64_t second_level_cache_bytes() {
  constexpr std::int64_t usual = 1 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const std::int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return told > 0 ? told : usual;
#else
  return usual;
#endif
}

/// A server's L3 can be hundreds of MiB, and keeps a part of anything not several times as large.
std::int64_t bytes_beyond_any_cache() {
  constexpr std::int64_t gibibyte = std::int64_t{1} << 30;
  const std::int64_t memory = static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  return std::min(std::max(gibibyte, 4 * last_level_cache_bytes()), memory / 8);
}

constexpr std::int64_t chunk = 1024;  // floats; every thread's share of a burst is a whole number of them

/// Each burst reads the next of `parts`, so that all the others lie between two reads of one.
ReadRate read_rate(const Level& level, int threads, std::int64_t burst_bytes, int parts, int bursts) {
  const std::int64_t share = burst_bytes / static_cast<std::int64_t>(sizeof(float)) / threads / chunk * chunk;
  const std::int64_t count = share * threads * parts;
  const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(float));
  const std::unique_ptr<float, FreeMemory> data(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!data) return {0.0, 0};
  std::fill_n(data.get(), count, 1.0f);
  std::vector<float> sums(threads);
  const double rate = best_rate(threads, bursts, [&](int thread, int i) {
    sums[thread] = level.read(data.get() + (i % parts * threads + thread) * share, share);
    return static_cast<double>(share) * sizeof(float);
  });
  volatile float used = 0.0f;
  for (float sum : sums) used = used + sum;
  return {rate * 1e-9, bytes};
}

}  // namespace

std::vector<const Level*> runnable_levels() {
#if defined(__x86_64__)
  std::vector<const Level*> levels = {&baseline};
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels.push_back(&avx2);
  if (__builtin_cpu_supports("avx512f")) levels.push_back(&avx512);
  if (__builtin_cpu_supports("avx512bf16")) levels.push_back(&avx512_bf16);
  if (cpu::has_matrix_unit()) levels.push_back(&avx512_amx);
  return levels;
#elif defined(__aarch64__)
  return {&neon};
#else
  return {&baseline};
#endif
}

double multiply_add_gflops(const Level& level, int threads) {
  constexpr std::int64_t steps_of_a_few_milliseconds = 1'000'000;
  return best_rate(threads, 12, [&](int, int) { return level.multiply_add(steps_of_a_few_milliseconds); }) * 1e-9;
}

ReadRate memory_read_rate(const Level& level, int threads) {
  constexpr std::int64_t burst_bytes = 32 << 20;  // a millisecond or two, as the shortest call compared with this
  constexpr int passes = 5;
  const auto parts = static_cast<int>(std::max<std::int64_t>(1, bytes_beyond_any_cache() / burst_bytes));
  return read_rate(level, threads, burst_bytes, parts, passes * parts);
}

ReadRate cache_read_rate(const Level& level, int threads) {
  constexpr int bursts = 200;
  return read_rate(level, threads, 4 * second_level_cache_bytes() * threads, 1, bursts);
}

}  // namespace flash_attn::ceilings
