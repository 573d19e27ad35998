#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
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

// A region in progress. Lives on its caller's stack; workers hold it only while `workers_inside` counts them.
struct Region {
  std::int64_t count;
  void (*body)(void*, std::int64_t, int);
  void* context;
  int max_slots;
  std::atomic<std::int64_t> next_task{0};
  int next_slot = 1;       // slot 0 is the caller's; guarded by the pool's mutex
  int workers_inside = 0;  // guarded by the pool's mutex
  Region* next_region = nullptr;
  std::mutex failure_mutex{};
  std::exception_ptr failure{};  // the first

  bool exhausted() const { return next_task.load(std::memory_order_relaxed) >= count; }

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
  void run(Region& region) {
    {
      std::lock_guard lock(mutex_);
      if (!regions_) placement_.avoid_this_cpu();
      region.next_region = regions_;
      regions_ = &region;
      const auto helpers = static_cast<int>(std::min<std::int64_t>(region.max_slots, region.count) - 1);
      for (; workers_ < helpers; ++workers_) std::thread([this] { serve(); }).detach();
    }
    wake_workers_.notify_all();
    region.work(0);
    std::unique_lock lock(mutex_);
    Region** link = &regions_;
    while (*link != &region) link = &(*link)->next_region;
    *link = region.next_region;
    region_left_.wait(lock, [&] { return region.workers_inside == 0; });
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

  [[noreturn]] void serve() {
    std::unique_lock lock(mutex_);
    placement_.add_this_worker();
    for (;;) {
      Region* region = nullptr;
      wake_workers_.wait(lock, [&] { return (region = open_region()) != nullptr; });
      const int slot = region->next_slot++;
      ++region->workers_inside;
      lock.unlock();
      region->work(slot);
      lock.lock();
      if (--region->workers_inside == 0) region_left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_workers_;
  std::condition_variable region_left_;
  Region* regions_ = nullptr;
  int workers_ = 0;
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

void run_tasks(std::int64_t count, int threads, void (*body)(void*, std::int64_t, int), void* context) {
  if (count <= 1 || threads == 1) {
    for (std::int64_t task = 0; task < count; ++task) body(context, task, 0);
    return;
  }
  Region region{.count = count, .body = body, .context = context, .max_slots = threads};
  pool().run(region);
}

}  // namespace flash_attn::cpu
