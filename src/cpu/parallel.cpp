#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace flash_attn::cpu {
namespace {

std::atomic<int> thread_count_override{0};

// CPU time that the container may use, in whole CPUs; 0 when unlimited.
int cgroup_cpus() {
  int cpus = 0;
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    long long quota = 0;
    long long period = 0;
    if (std::fscanf(file, "%lld %lld", &quota, &period) == 2 && period > 0) {
      cpus = static_cast<int>(std::max<long long>(1, (quota + period - 1) / period));
    }
    std::fclose(file);
  }
  return cpus;
}

int usable_cpus() {
  int cpus = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cpus = CPU_COUNT(&set);
#endif
  if (const int quota = cgroup_cpus(); quota > 0) cpus = std::min(cpus, quota);
  return std::max(1, cpus);
}

void pause_processor() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Where workers wake up. Linux may start a thread on the CPU of the one that woke it and let the two share it for milliseconds
// while another CPU idles: longer than many a region lasts. So workers keep off the CPU that regions are called from.
class WorkerPlacement {
 public:
#if defined(__linux__)
  void add_this_worker() {
    workers_.push_back(static_cast<pid_t>(syscall(SYS_gettid)));
    avoided_cpu_ = -1;
  }

  /// While all workers sleep. System calls only when the caller is on another CPU than last time.
  void avoid_this_cpu() {
    const int cpu = sched_getcpu();
    if (cpu == avoided_cpu_ || cpu < 0 || cpu >= CPU_SETSIZE) return;
    cpu_set_t cpus;
    if (sched_getaffinity(0, sizeof(cpus), &cpus) != 0) return;
    CPU_CLR(cpu, &cpus);
    if (CPU_COUNT(&cpus) < static_cast<int>(workers_.size())) return;
    for (const pid_t worker : workers_) sched_setaffinity(worker, sizeof(cpus), &cpus);
    avoided_cpu_ = cpu;
  }

 private:
  std::vector<pid_t> workers_;
  int avoided_cpu_ = -1;
#else
  void add_this_worker() {}
  void avoid_this_cpu() {}
#endif
};

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// A thread that waits looks for what it waits for so long before it sleeps: waking a sleeping CPU takes half of that.
constexpr microseconds patience{100};
// A thread that finds so much time gone was off its CPU, which another wanted: turns last milliseconds, while interrupts and
// the kernel's own work take tens of microseconds.
constexpr microseconds interruption{500};
// After which it does not look, but sleep at once: who slept gets its CPU back sooner than who used it up by looking.
constexpr microseconds crowded_spell{100'000};

// How a thread waits for others: awake for a while, since much that it waits for comes within microseconds, but giving way to
// whoever wants its CPU.
class Patience {
 public:
  /// False: `done` has not come true, and it is time to sleep.
  template <class Done>
  bool look_for(Done done) {
    Clock::time_point now = Clock::now();
    if (now < crowded_until_) return done();
    const Clock::time_point end = now + patience;
    while (now < end) {
      for (int i = 0; i < 16; ++i) {
        if (done()) return true;
        pause_processor();
      }
      std::this_thread::yield();
      const Clock::time_point before = now;
      now = Clock::now();
      if (now - before > interruption) {
        crowded_until_ = now + crowded_spell;
        break;
      }
    }
    return done();
  }

 private:
  Clock::time_point crowded_until_{};
};

// A region in progress. Lives on its caller's stack; workers hold it only while `workers_inside` counts them.
struct Region {
  std::int64_t count;
  void (*body)(void*, std::int64_t, int);
  void* context;
  int max_slots;
  std::atomic<std::int64_t> next_task{0};
  int next_slot = 1;                   // slot 0 is the caller's; guarded by the pool's mutex
  std::atomic<int> workers_inside{0};  // changed under the pool's mutex
  Region* next_region = nullptr;
  std::mutex failure_mutex{};
  std::exception_ptr failure{};  // the first

  bool exhausted() const { return next_task.load(std::memory_order_relaxed) >= count; }
  bool is_left() const { return workers_inside.load(std::memory_order_acquire) == 0; }

  // What a task throws ends the region; its caller gets it, whichever thread it was thrown in.
  void work(int slot) noexcept {
    try {
      for (std::int64_t task; (task = next_task.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, task, slot);
    } catch (...) {
      next_task.store(count, std::memory_order_relaxed);
      std::lock_guard lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  }
};

class Pool {
 public:
  void run(Region& region, bool is_short) {
    int to_wake = 0;
    {
      std::lock_guard lock(mutex_);
      if (!regions_) placement_.avoid_this_cpu();
      region.next_region = regions_;
      regions_ = &region;
      regions_opened_.fetch_add(1, std::memory_order_release);
      const auto helpers = static_cast<int>(std::min<std::int64_t>(region.max_slots, region.count) - 1);
      for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
      if (!is_short) to_wake = std::min(helpers - awake_, asleep_);
    }
    for (int i = 0; i < to_wake; ++i) wake_workers_.notify_one();
    region.work(0);
    std::unique_lock lock(mutex_);
    Region** link = &regions_;
    while (*link != &region) link = &(*link)->next_region;
    *link = region.next_region;
    if (!region.is_left()) {
      lock.unlock();
      const bool is_left = Patience().look_for([&] { return region.is_left(); });
      lock.lock();
      if (!is_left) region_left_.wait(lock, [&] { return region.is_left(); });
    }
    lock.unlock();
    if (region.failure) std::rethrow_exception(region.failure);
  }

 private:
  // A region that still has tasks and a free slot.
  Region* open_region() const {
    for (Region* region = regions_; region; region = region->next_region) {
      if (region->next_slot < region->max_slots && !region->exhausted()) return region;
    }
    return nullptr;
  }

  // One follows another soon, or not for long.
  Region* next_open_region(std::unique_lock<std::mutex>& lock, Patience& patience) {
    if (Region* region = open_region()) return region;
    const std::uint64_t seen = regions_opened_.load(std::memory_order_relaxed);
    ++awake_;
    lock.unlock();
    patience.look_for([&] { return regions_opened_.load(std::memory_order_acquire) != seen; });
    lock.lock();
    --awake_;
    Region* region = nullptr;
    ++asleep_;
    wake_workers_.wait(lock, [&] { return (region = open_region()) != nullptr; });
    --asleep_;
    return region;
  }

  [[noreturn]] void serve() {
    std::unique_lock lock(mutex_);
    placement_.add_this_worker();
    Patience patience;
    for (;;) {
      Region* region = next_open_region(lock, patience);
      const int slot = region->next_slot++;
      region->workers_inside.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      region->work(slot);
      lock.lock();
      if (region->workers_inside.fetch_sub(1, std::memory_order_acq_rel) == 1) region_left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_workers_;
  std::condition_variable region_left_;
  Region* regions_ = nullptr;
  std::atomic<std::uint64_t> regions_opened_{0};
  int workers_ = 0;
  int awake_ = 0;   // workers that look for a region
  int asleep_ = 0;  // workers to be woken for one
  WorkerPlacement placement_;
};

// Never destroyed: workers may outlive static destructors. A forked child has no workers and perhaps a locked mutex: it starts
// anew.
std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  static const bool registered = [] {
    current_pool = new Pool;
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { current_pool = new Pool; });
#endif
    return true;
  }();
  static_cast<void>(registered);
  return *current_pool;
}

}  // namespace

int thread_count() {
  if (const int threads = thread_count_override.load(std::memory_order_relaxed); threads > 0) return threads;
  if (const char* text = std::getenv("FLASH_ATTENTION_MLX_THREADS")) {
    if (const int threads = std::atoi(text); threads > 0) return std::min(threads, 1024);
  }
  static const int cpus = usable_cpus();
  return cpus;
}

void set_thread_count_for_testing(int threads) { thread_count_override = threads; }

void run_tasks(std::int64_t count, int threads, Nanoseconds work, void (*body)(void*, std::int64_t, int), void* context) {
  if (count <= 1 || threads == 1) {
    for (std::int64_t task = 0; task < count; ++task) body(context, task, 0);
    return;
  }
  Region region{.count = count, .body = body, .context = context, .max_slots = threads};
  pool().run(region, work < short_region);
}

}  // namespace flash_attn::cpu
