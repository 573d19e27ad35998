// The thread pool: every task once, from any number of callers, nested, and after fork.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

// A child of fork that starts threads is what one test is about; ThreadSanitizer gives up on it unless told otherwise.
extern "C" const char* __tsan_default_options();
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }

namespace flash_attn::cpu {
namespace {

// How often each task of a region ran.
std::vector<int> run_counts(std::int64_t count, int threads) {
  std::vector<std::atomic<int>> runs(static_cast<std::size_t>(count));
  parallel_for(count, threads, [&](std::int64_t task, int) { ++runs[static_cast<std::size_t>(task)]; });
  return {runs.begin(), runs.end()};
}

class ParallelFor : public testing::TestWithParam<int> {};

TEST_P(ParallelFor, RunsEveryTaskOnce) {
  for (std::int64_t count : {0, 1, 2, 3, 7, 100, 10000}) {
    EXPECT_EQ(run_counts(count, GetParam()), std::vector<int>(static_cast<std::size_t>(count), 1)) << count;
  }
}

TEST_P(ParallelFor, RunsEveryTaskOfAShortRegionOnce) {
  for (std::int64_t count : {1, 2, 7, 100}) {
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(count));
    parallel_for(count, GetParam(), Nanoseconds{0}, [&](std::int64_t task, int) { ++runs[static_cast<std::size_t>(task)]; });
    EXPECT_TRUE(std::all_of(runs.begin(), runs.end(), [](const std::atomic<int>& number) { return number == 1; })) << count;
  }
}

TEST_P(ParallelFor, GivesEachThreadASlotOfItsOwn) {
  const int threads = GetParam();
  std::vector<std::atomic<bool>> busy(static_cast<std::size_t>(threads));
  std::atomic<int> wrong{0};
  parallel_for(2000, threads, [&](std::int64_t, int slot) {
    if (slot < 0 || slot >= threads) {
      ++wrong;
      return;
    }
    std::atomic<bool>& mine = busy[static_cast<std::size_t>(slot)];
    if (mine.exchange(true)) ++wrong;
    std::this_thread::yield();
    mine = false;
  });
  EXPECT_EQ(wrong, 0);
}

TEST_P(ParallelFor, ThrowsToItsCallerWhatATaskThrows) {
  for (int round = 0; round < 50; ++round) {
    std::vector<std::atomic<int>> runs(100);
    const auto fail_once = [&](std::int64_t task, int) {
      ++runs[static_cast<std::size_t>(task)];
      if (task == 17) throw std::runtime_error("task 17");
    };
    EXPECT_THROW(parallel_for(100, GetParam(), fail_once), std::runtime_error);
    EXPECT_EQ(runs[17], 1);
    EXPECT_TRUE(std::all_of(runs.begin(), runs.end(), [](const std::atomic<int>& count) { return count <= 1; }));
    EXPECT_EQ(run_counts(100, GetParam()), std::vector<int>(100, 1));  // the pool goes on
  }
}

TEST_P(ParallelFor, WritesAreSeenByTheCaller) {
  std::vector<int> values(5000, 0);
  for (int round = 1; round <= 20; ++round) {
    parallel_for(5000, GetParam(), [&](std::int64_t task, int) { values[static_cast<std::size_t>(task)] += 1; });
    ASSERT_EQ(values, std::vector<int>(5000, round));
  }
}

TEST_P(ParallelFor, Nests) {
  std::atomic<int> runs{0};
  parallel_for(8, GetParam(), [&](std::int64_t, int) {
    parallel_for(16, GetParam(), [&](std::int64_t, int) { parallel_for(4, GetParam(), [&](std::int64_t, int) { ++runs; }); });
  });
  EXPECT_EQ(runs, 8 * 16 * 4);
}

TEST_P(ParallelFor, ServesSeveralCallersAtOnce) {
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) wrong += run_counts(37, GetParam()) != std::vector<int>(37, 1);
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST_P(ParallelFor, WorksInAForkedChild) {
  run_counts(100, GetParam());  // the parent has workers, which the child does not inherit
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);  // a child that hangs dies
    _exit(run_counts(1000, GetParam()) == std::vector<int>(1000, 1) ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(run_counts(100, GetParam()), std::vector<int>(100, 1));
}

INSTANTIATE_TEST_SUITE_P(Threads, ParallelFor, testing::Values(1, 2, 3, 5, 16));

// Two tasks that wait for each other end only if two threads run them.
TEST(Parallel, UsesMoreThanOneThread) {
  std::atomic<int> arrived{0};
  parallel_for(2, 2, [&](std::int64_t, int) {
    ++arrived;
    while (arrived < 2) std::this_thread::yield();
  });
  EXPECT_EQ(arrived, 2);
}

TEST(Parallel, IdleWorkersSleep) {
  const auto cpu_time = [] {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  };
  run_counts(100, 2);
  const auto before = cpu_time();
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  EXPECT_LT(cpu_time() - before, std::chrono::milliseconds(50));
}

TEST(Parallel, TasksStartInAscendingOrder) {
  std::vector<std::vector<std::int64_t>> tasks_of_slot(3);
  parallel_for(1000, 3, [&](std::int64_t task, int slot) { tasks_of_slot[static_cast<std::size_t>(slot)].push_back(task); });
  for (const std::vector<std::int64_t>& tasks : tasks_of_slot) EXPECT_TRUE(std::is_sorted(tasks.begin(), tasks.end()));
}

TEST(Parallel, ThreadCountFollowsTheEnvironmentAndTheOverride) {
  EXPECT_GE(thread_count(), 1);
  setenv("FLASH_ATTENTION_MLX_THREADS", "7", 1);
  EXPECT_EQ(thread_count(), 7);
  set_thread_count_for_testing(3);
  EXPECT_EQ(thread_count(), 3);
  set_thread_count_for_testing(0);
  EXPECT_EQ(thread_count(), 7);
  for (const char* nonsense : {"", "0", "-4", "many"}) {
    setenv("FLASH_ATTENTION_MLX_THREADS", nonsense, 1);
    EXPECT_GE(thread_count(), 1) << nonsense;
  }
  unsetenv("FLASH_ATTENTION_MLX_THREADS");
}

}  // namespace
}  // namespace flash_attn::cpu
