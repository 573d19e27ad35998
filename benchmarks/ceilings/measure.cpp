#include "ceilings/measure.h"

#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <barrier>
#include <chrono>
#include <new>
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

ReadWalk::ReadWalk(const Level& level, int threads, std::int64_t burst_bytes, int parts)
    : level_(level),
      threads_(threads),
      share_(std::max<std::int64_t>(1, burst_bytes / static_cast<std::int64_t>(sizeof(float)) / threads / chunk) * chunk),
      parts_(parts),
      data_(static_cast<float*>(std::aligned_alloc(64, bytes()))) {
  if (!data_) throw std::bad_alloc();
  std::fill_n(data_.get(), bytes() / static_cast<std::int64_t>(sizeof(float)), 1.0f);
}

double ReadWalk::best_gigabytes_per_second(int bursts) {
  std::vector<float> sums(threads_);
  const double rate = best_rate(threads_, bursts, [&](int thread, int i) {
    sums[thread] = level_.read(data_.get() + ((next_ + i) % parts_ * threads_ + thread) * share_, share_);
    return static_cast<double>(share_) * sizeof(float);
  });
  next_ = (next_ + bursts) % parts_;
  volatile float used = 0.0f;
  for (float sum : sums) used = used + sum;
  return rate * 1e-9;
}

ReadWalk memory_walk(const Level& level, int threads, std::int64_t burst_bytes) {
  return {level, threads, burst_bytes, static_cast<int>(std::max<std::int64_t>(1, bytes_beyond_any_cache() / burst_bytes))};
}

ReadRate memory_read_rate(const Level& level, int threads) {
  constexpr std::int64_t burst_bytes = 32 << 20;  // a millisecond or two
  constexpr int passes = 5;
  ReadWalk walk = memory_walk(level, threads, burst_bytes);
  return {walk.best_gigabytes_per_second(passes * static_cast<int>(walk.bytes() / burst_bytes)), walk.bytes()};
}

ReadRate cache_read_rate(const Level& level, int threads) {
  constexpr int bursts = 200;
  ReadWalk walk(level, threads, 4 * second_level_cache_bytes() * threads, 1);
  return {walk.best_gigabytes_per_second(bursts), walk.bytes()};
}

}  // namespace flash_attn::ceilings
