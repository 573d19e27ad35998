// cpu::PageOrder, and decode of caches so long that their pages change places.

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <tuple>
#include <vector>

#include "cases.h"
#include "cpu/page_order.h"
#include "cpu/sequences.h"
#include "test_call.h"

namespace flash_attn::test {
namespace {

// 75 pages of 16 keys a sequence: in float32 more than what may be in cache.
AttentionProblem long_problem(Features& features, std::int32_t seqlen_q = 1) {
  AttentionProblem problem = cached_problem(2, seqlen_q, 1200, 128, 128);
  problem.heads_q = problem.heads_k = 8;
  make_pages(problem, features, 16);
  std::shuffle(features.cache.block_table.begin(), features.cache.block_table.end(), std::mt19937(7));
  return problem;
}

TEST(SortPages, MatchesComparison) {
  std::mt19937 random(1);
  for (std::int32_t most : {0, 1, 255, 256, 70'000, 20'000'000, 2'147'483'647}) {
    for (std::size_t count : {0, 1, 2, 100, 1000}) {
      std::vector<std::int32_t> pages(count);
      std::uniform_int_distribution<std::int32_t> page(most == 1 ? -1 : 0, most);
      for (std::int32_t& x : pages) x = page(random);
      std::vector<std::int32_t> expected = pages;
      std::sort(expected.begin(), expected.end(),
                [](std::int32_t a, std::int32_t b) { return static_cast<std::uint32_t>(a) < static_cast<std::uint32_t>(b); });
      std::vector<std::int32_t> scratch(count);
      cpu::sort_pages(pages.data(), scratch.data(), static_cast<std::int32_t>(count));
      EXPECT_EQ(pages, expected) << most << ", " << count;
    }
  }
}

// The rows of the table that decode reads.
std::vector<std::vector<std::int32_t>> rows_in_order(const TestCall& call, bool& is_new) {
  std::vector<cpu::Sequence> sequences = cpu::sequences_of(call.problem, call.inputs);
  const cpu::PageOrder order(call.problem, call.inputs, 2, sequences);
  is_new = order.inputs().cache.block_table != call.inputs.cache.block_table;
  std::vector<std::vector<std::int32_t>> rows;
  for (const cpu::Sequence& sequence : sequences) {
    const std::int32_t* row = order.inputs().cache.block_table + std::int64_t{sequence.cache_row} * call.problem.table_blocks;
    rows.emplace_back(row, row + (sequence.k.begin + sequence.k.length + call.problem.page_size - 1) / call.problem.page_size);
  }
  return rows;
}

TEST(PageOrder, SortsThePagesThatEveryRowSeesAndLeavesTheOthers) {
  Features features;
  AttentionProblem problem = long_problem(features, 3);
  problem.causal = true;
  problem.window_left = 1149;
  features.seqused_k = {1199, 1200};
  features.cache.batch_idx = {1, 1};
  features.cache.leftpad = {0, 1};
  TestCall call(problem, features, 1);
  bool is_new = false;
  const auto rows = rows_in_order(call, is_new);
  ASSERT_TRUE(is_new);
  const auto given = features.cache.block_table.begin() + problem.table_blocks;
  // Queries at 1196 to 1198 of the first sequence, 49 to 1196 seen by all. The second has a key before its first.
  for (std::size_t i = 0; i < 2; ++i) {
    std::vector<std::int32_t> expected(given, given + 75);
    std::sort(expected.begin() + 4, expected.begin() + 74);
    EXPECT_EQ(rows[i], expected) << i;
  }
}

TEST(PageOrder, IsTheCallersWhereScoresDependOnPositionsOrCachesSuffice) {
  const auto is_new = [](auto change) {
    Features features;
    AttentionProblem problem = long_problem(features);
    change(problem, features);
    TestCall call(problem, features, 2);
    bool result = false;
    rows_in_order(call, result);
    return result;
  };
  EXPECT_TRUE(is_new([](AttentionProblem&, Features&) {}));
  EXPECT_FALSE(is_new([](AttentionProblem&, Features& features) { features.alibi = true; }));
  EXPECT_FALSE(is_new([](AttentionProblem&, Features& features) { features.attn_mask = true; }));
  EXPECT_FALSE(is_new([](AttentionProblem& problem, Features&) { set_dropout(problem, 0.5); }));
  EXPECT_FALSE(is_new([](AttentionProblem&, Features& features) { features.seqused_k = {1000, 900}; }));
  EXPECT_FALSE(is_new([](AttentionProblem& problem, Features&) { problem.attention_chunk = 700; }));
}

class DecodeOfManyPages : public testing::TestWithParam<std::tuple<Case, Storage>> {};

TEST_P(DecodeOfManyPages, MatchesTheReference) {
  Features features;
  AttentionProblem problem = long_problem(features, 2);
  std::get<Case>(GetParam()).apply(problem, features);
  std::get<Storage>(GetParam()).apply(problem, features);
  TestCall call(problem, features, 3);
  EXPECT_EQ(check_forward(call), "");
}

const std::vector<Case> cases = {
    {"full", [](AttentionProblem&, Features&) {}},
    {"causal_odd_lengths",
     [](AttentionProblem& problem, Features& features) {
       problem.causal = true;
       features.seqused_k = {1189, 1151};
     }},
    {"window",
     [](AttentionProblem& problem, Features&) {
       problem.window_left = 1111;
       problem.window_right = 0;
     }},
    {"rows_and_leftpad",
     [](AttentionProblem& problem, Features& features) {
       problem.causal = true;
       features.cache.batch_idx = {1, 1};
       features.cache.leftpad = {17, 3};
     }},
    {"missing_and_shared_pages",
     [](AttentionProblem&, Features& features) {
       for (std::size_t entry : {3, 17, 74, 80}) features.cache.block_table[entry] = -1;
       features.cache.block_table[20] = 1 << 30;
       features.cache.block_table[90] = features.cache.block_table[91] = features.cache.block_table[1];
     }},
    {"splits", [](AttentionProblem& problem, Features&) { problem.num_splits = 5; }},
    {"sink_and_softcap",
     [](AttentionProblem& problem, Features& features) {
       features.sink = true;
       problem.softcap = 2.0f;
     }},
    {"alibi", [](AttentionProblem&, Features& features) { features.alibi = true; }},
};

INSTANTIATE_TEST_SUITE_P(All, DecodeOfManyPages, testing::Combine(testing::ValuesIn(cases), testing::ValuesIn(storages())),
                         [](const auto& info) {
                           return std::string(std::get<Case>(info.param).name) + "_" + std::get<Storage>(info.param).name;
                         });

}  // namespace
}  // namespace flash_attn::test
