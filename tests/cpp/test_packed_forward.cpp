// cpu::forward of units with several tasks and blocks of keys, whose dims lie side by side: what is packed while products run.

#include <gtest/gtest.h>

#include <tuple>

#include "cases.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace flash_attn::test {
namespace {

class PackedForward : public testing::TestWithParam<std::tuple<Case, DType>> {
 protected:
  void TearDown() override {
    cpu::force_isa_level_for_testing(nullptr);
    cpu::set_thread_count_for_testing(0);
  }

  // On every level of this machine; several threads, so that some find no unit left.
  static void check(AttentionProblem problem) {
    Features features;
    std::get<Case>(GetParam()).apply(problem, features);
    problem.dtype = std::get<DType>(GetParam());
    cpu::set_thread_count_for_testing(3);
    for (int i = 0; i < cpu::isa_level_count(); ++i) {
      ASSERT_TRUE(cpu::force_isa_level_for_testing(cpu::isa_level_name(i)));
      TestCall call(problem, features, 12);
      EXPECT_EQ(check_forward(call), "") << cpu::isa_level_name();
    }
  }
};

class PackedForwardOfTensors : public PackedForward {};

TEST_P(PackedForwardOfTensors, MatchesTheReference) { check(dense_problem(2, 107, 269, 64, 32)); }

class PackedForwardOfCaches : public PackedForward {};

TEST_P(PackedForwardOfCaches, MatchesTheReference) { check(cached_problem(2, 107, 269, 64, 32)); }

const std::vector<Case> tensor_cases = {
    {"full", [](AttentionProblem&, Features&) {}},
    {"as_many_kv_heads", [](AttentionProblem& problem, Features&) { problem.heads_k = problem.heads_q; }},
    {"causal", [](AttentionProblem& problem, Features&) { problem.causal = true; }},
    {"window",
     [](AttentionProblem& problem, Features&) {
       problem.window_left = 37;
       problem.window_right = 20;
     }},
    {"even_lengths",
     [](AttentionProblem& problem, Features& features) {
       features.seqused_q = {107, 64};
       features.seqused_k = {256, 130};
       problem.causal = true;
     }},
    {"an_empty_sequence",
     [](AttentionProblem&, Features& features) {
       features.seqused_q = {0, 107};
       features.seqused_k = {269, 0};
     }},
    {"groups_that_end_within_a_task",
     [](AttentionProblem& problem, Features&) {
       problem.heads_q = 5;
       problem.heads_k = 1;
     }},
    {"heads_first", [](AttentionProblem&, Features& features) { features.q = features.k = features.v = Layout::heads_first; }},
    {"backwards", [](AttentionProblem&, Features& features) { features.q = features.k = features.v = Layout::reversed; }},
    {"dims_apart", [](AttentionProblem&, Features& features) { features.k = Layout::strided_dim; }},
    {"mask",
     [](AttentionProblem&, Features& features) {
       features.attn_mask = true;
       features.mask_dtype = DType::float32;
     }},
    {"dropout", [](AttentionProblem& problem, Features&) { set_dropout(problem, 0.3); }},
};

const auto name_of_case = [](const auto& info) {
  return std::string(std::get<Case>(info.param).name) + "_" + name_of(std::get<DType>(info.param));
};
const auto dtypes = testing::Values(DType::float32, DType::bfloat16, DType::float16);

INSTANTIATE_TEST_SUITE_P(All, PackedForwardOfTensors, testing::Combine(testing::ValuesIn(tensor_cases), dtypes), name_of_case);
INSTANTIATE_TEST_SUITE_P(All, PackedForwardOfCaches, testing::Combine(testing::ValuesIn(cache_cases()), dtypes), name_of_case);

}  // namespace
}  // namespace flash_attn::test
