// The same bits on every run and for every number of threads.

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <utility>

#include "cases.h"
#include "cpu/parallel.h"
#include "element.h"

namespace flash_attn::test {
namespace {

class Determinism : public testing::TestWithParam<Case> {
 protected:
  void TearDown() override { cpu::set_thread_count_for_testing(0); }

  TestCall call() {
    AttentionProblem problem = dense_problem(2, 150, 170, 20, 12);
    Features features;
    GetParam().apply(problem, features);
    features.out = Layout::contiguous;
    return TestCall(problem, features, 30);
  }
};

std::string bytes_of(const void* data, std::int64_t elements) {
  return data ? std::string(static_cast<const char*>(data), static_cast<std::size_t>(elements) * sizeof(float)) : std::string();
}

std::vector<std::string> forward_bits(TestCall& call) {
  const AttentionProblem& problem = call.problem;
  cpu::forward(problem, call.inputs, call.outputs);
  const std::int64_t rows = query_rows(problem) * problem.heads_q;
  return {bytes_of(call.outputs.out.data, rows * problem.head_dim_v), bytes_of(call.outputs.lse, rows)};
}

std::vector<std::string> backward_bits(TestCall& call) {
  const AttentionProblem& problem = call.problem;
  const cpu::Gradients& gradients = call.gradients;
  cpu::backward(problem, call.inputs, call.saved, gradients);
  const std::int64_t keys = key_rows(problem) * problem.heads_k;
  return {bytes_of(gradients.dq.data, query_rows(problem) * problem.heads_q * problem.head_dim),
          bytes_of(gradients.dk.data, keys * problem.head_dim), bytes_of(gradients.dv.data, keys * problem.head_dim_v),
          bytes_of(gradients.dsink, problem.heads_q),
          bytes_of(gradients.dmask,
                   std::int64_t{gradients.dmask_batch} * gradients.dmask_heads * gradients.dmask_rows * gradients.dmask_keys)};
}

template <class Bits>
void expect_same_bits(TestCall& call, Bits bits) {
  cpu::set_thread_count_for_testing(1);
  const std::vector<std::string> expected = bits(call);
  for (int threads : {1, 2, 3, 5}) {
    cpu::set_thread_count_for_testing(threads);
    EXPECT_TRUE(bits(call) == expected) << threads << " threads";
  }
}

TEST_P(Determinism, ForwardGivesTheSameBits) {
  TestCall test_call = call();
  expect_same_bits(test_call, forward_bits);
}

TEST_P(Determinism, BackwardGivesTheSameBits) {
  TestCall test_call = call();
  cpu::forward(test_call.problem, test_call.inputs, test_call.outputs);
  const cpu::Tensor& out = test_call.outputs.out;
  test_call.saved.out = {out.data, out.dtype, out.strides};
  test_call.saved.lse = test_call.outputs.lse;
  expect_same_bits(test_call, backward_bits);
}

// More threads than CPUs, so that one waits in the middle of a unit while others finish theirs and help.
TEST(ManyThreads, GiveTheSameBits) {
  AttentionProblem problem = dense_problem(1, 500, 500, 32, 32);
  problem.heads_q = problem.heads_k = 7;
  problem.causal = true;
  TestCall call(problem, {}, 31);
  cpu::set_thread_count_for_testing(1);
  const std::vector<std::string> expected = forward_bits(call);
  for (int threads = 2; threads <= 8; ++threads) {
    cpu::set_thread_count_for_testing(threads);
    for (int round = 0; round < 10; ++round) EXPECT_TRUE(forward_bits(call) == expected) << threads << " threads";
  }
  cpu::set_thread_count_for_testing(0);
}

// Streams of a framework evaluate at the same time.
TEST(ConcurrentCallers, GetTheSameBitsAsOneAlone) {
  cpu::set_thread_count_for_testing(3);
  const auto run = [](std::uint64_t seed) {
    Features features;
    features.sink = true;
    TestCall call(dense_problem(2, 90, 110, 20, 12), features, seed);
    std::vector<std::string> bits = forward_bits(call);
    const cpu::Tensor& out = call.outputs.out;
    call.saved.out = {out.data, out.dtype, out.strides};
    call.saved.lse = call.outputs.lse;
    for (std::string& gradient : backward_bits(call)) bits.push_back(std::move(gradient));
    return bits;
  };
  constexpr std::uint64_t callers = 4;
  std::vector<std::vector<std::string>> alone;
  for (std::uint64_t seed = 0; seed < callers; ++seed) alone.push_back(run(seed));

  std::atomic<int> different{0};
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 0; seed < callers; ++seed) {
    threads.emplace_back([&, seed] {
      for (int round = 0; round < 5; ++round) different += run(seed) != alone[seed];
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(different, 0);
  cpu::set_thread_count_for_testing(0);
}

INSTANTIATE_TEST_SUITE_P(All, Determinism, testing::ValuesIn(feature_cases()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace flash_attn::test
