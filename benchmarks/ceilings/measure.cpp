#include "ceilings/measure.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <thread>

namespace flash_attn::ceilings {
namespace {

double seconds_now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Largest work / seconds of `bursts`, all threads starting each together; `burst(thread)` returns the work it did.
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
      work[thread] = burst(thread);
      finish.arrive_and_wait();
    }
  };
  std::vector<std::jthread> workers;
  for (int thread = 1; thread < threads; ++thread) workers.emplace_back(run, thread);
  run(0);
  workers.clear();
  return best;
}

struct FreeMemory {
  void operator()(float* data) const { std::free(data); }
};

}  // namespace

std::vector<const Level*> runnable_levels() {
#if defined(__x86_64__)
  std::vector<const Level*> levels = {&baseline};
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels.push_back(&avx2);
  if (__builtin_cpu_supports("avx512f")) levels.push_back(&avx512);
  if (__builtin_cpu_supports("avx512bf16")) levels.push_back(&avx512_bf16);
  return levels;
#elif defined(__aarch64__)
  return {&neon};
#else
  return {&baseline};
#endif
}

double multiply_add_gflops(const Level& level, int threads) {
  constexpr std::int64_t steps_of_a_few_milliseconds = 1'000'000;
  return best_rate(threads, 30, [&](int) { return level.multiply_add(steps_of_a_few_milliseconds); }) * 1e-9;
}

double read_gigabytes_per_second(const Level& level, int threads) {
  constexpr std::int64_t bytes_beyond_any_cache = 256 << 20;
  constexpr std::int64_t chunk = 1024;  // floats; every thread's share is a whole number of them
  const std::int64_t share = bytes_beyond_any_cache / 4 / threads / chunk * chunk;
  const std::int64_t count = share * threads;
  const std::unique_ptr<float, FreeMemory> data(static_cast<float*>(std::aligned_alloc(64, count * sizeof(float))));
  if (!data) return 0.0;
  std::fill_n(data.get(), count, 1.0f);
  std::vector<float> sums(threads);
  const double rate = best_rate(threads, 5, [&](int thread) {
    sums[thread] = level.read(data.get() + share * thread, share);
    return static_cast<double>(share) * sizeof(float);
  });
  volatile float used = 0.0f;
  for (float sum : sums) used = used + sum;
  return rate * 1e-9;
}

}  // namespace flash_attn::ceilings
