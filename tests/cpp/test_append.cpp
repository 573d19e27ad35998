// cpu::append and cpu::rotate_queries against the scalar reference, and the promises that a comparison alone would not show.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "call_parts.h"
#include "cases.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "element.h"

namespace flash_attn::test {
namespace {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

class Append : public testing::TestWithParam<std::tuple<Case, Storage>> {
 protected:
  void TearDown() override { cpu::force_isa_level_for_testing(nullptr); }

  static TestCall call(std::int32_t seqlen_q) {
    const Storage& storage = std::get<Storage>(GetParam());
    AttentionProblem problem = cached_problem(2, seqlen_q, 133, storage.head_dim(26), storage.head_dim(70));
    Features features;
    storage.apply(problem, features);
    std::get<Case>(GetParam()).apply(problem, features);
    return TestCall(problem, features, 40);
  }
};

// Appends, rotates and attends.
TEST_P(Append, AndAttentionMatchTheReference) {
  for (std::int32_t seqlen_q : {1, 20}) {
    for (int i = 0; i < cpu::isa_level_count(); ++i) {
      ASSERT_TRUE(cpu::force_isa_level_for_testing(cpu::isa_level_name(i)));
      TestCall test_call = call(seqlen_q);
      EXPECT_EQ(check_cached(test_call), "") << cpu::isa_level_name() << ", queries " << seqlen_q;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Append, testing::Combine(testing::ValuesIn(append_cases()), testing::ValuesIn(storages())),
                         [](const auto& info) {
                           return std::string(std::get<Case>(info.param).name) + "_" + std::get<Storage>(info.param).name;
                         });

// One head of one element in float32: the cache can be read off.
struct Line {
  TestCall call;

  static AttentionProblem problem(std::int32_t batch, std::int32_t capacity, std::int32_t seqlen_new) {
    AttentionProblem problem = cached_problem(batch, 1, capacity, 1, 1);
    problem.heads_q = problem.heads_k = 1;
    problem.seqlen_new = seqlen_new;
    return problem;
  }

  explicit Line(const AttentionProblem& problem, const Features& features) : call(problem, features, 41) {
    auto* cache = static_cast<float*>(call.cache.k.data);
    for (std::int64_t i = 0; i < key_rows(problem); ++i) cache[i] = 0.0f;
    auto* new_keys = static_cast<float*>(const_cast<void*>(call.new_keys.k.data));
    for (std::int32_t i = 0; i < problem.batch * problem.seqlen_new; ++i) new_keys[i] = static_cast<float>(i + 1);
  }

  std::vector<float> appended() {
    cpu::append(call.problem, call.inputs, call.new_keys, call.rotary, call.cache);
    const auto* cache = static_cast<const float*>(call.cache.k.data);
    return {cache, cache + key_rows(call.problem)};
  }
};

TEST(AppendSlots, FollowWhatEachSequenceHas) {
  Features features;
  features.seqused_k = {3, 0};
  EXPECT_EQ(Line(Line::problem(2, 5, 2), features).appended(), (std::vector<float>{0, 0, 0, 1, 2, 3, 4, 0, 0, 0}));
}

TEST(AppendSlots, CountFromTheStartOfTheRowWhateverTheLeftpad) {
  Features features;
  features.seqused_k = {3};
  features.cache.leftpad = {2};
  EXPECT_EQ(Line(Line::problem(1, 5, 2), features).appended(), (std::vector<float>{0, 0, 0, 1, 2}));
}

TEST(AppendSlots, PastTheCapacityAreDropped) {
  Features features;
  features.seqused_k = {4, 5};
  EXPECT_EQ(Line(Line::problem(2, 5, 3), features).appended(), (std::vector<float>{0, 0, 0, 0, 1, 0, 0, 0, 0, 0}));
}

TEST(AppendSlots, AreThoseOfTheRowThatBatchIdxNames) {
  AttentionProblem problem = Line::problem(2, 3, 1);
  problem.cache_rows = 3;
  Features features;
  features.seqused_k = {0, 1};
  features.cache.batch_idx = {2, 0};
  EXPECT_EQ(Line(problem, features).appended(), (std::vector<float>{0, 2, 0, 0, 0, 0, 1, 0, 0}));
}

TEST(AppendSlots, OfARowThatDoesNotExistAreDropped) {
  Features features;
  features.seqused_k = {0, 0};
  features.cache.batch_idx = {-1, 2};
  EXPECT_EQ(Line(Line::problem(2, 3, 1), features).appended(), std::vector<float>(6, 0.0f));
}

TEST(AppendSlots, LieWhereTheBlockTableSays) {
  AttentionProblem problem = Line::problem(1, 6, 4);
  Features features;
  features.seqused_k = {1};
  problem.page_size = 2;
  problem.table_rows = 1;
  problem.table_blocks = 3;
  problem.cache_rows = 4;
  features.cache.block_table = {3, 0, 2};
  EXPECT_EQ(Line(problem, features).appended(), (std::vector<float>{2, 3, 0, 0, 4, 0, 0, 1}));
}

TEST(AppendSlots, OnAPageThatDoesNotExistAreDropped) {
  for (std::int32_t missing : {-1, 3, std::numeric_limits<std::int32_t>::min(), std::numeric_limits<std::int32_t>::max()}) {
    AttentionProblem problem = Line::problem(1, 6, 5);
    Features features;
    features.seqused_k = {1};
    problem.page_size = 2;
    problem.table_rows = 1;
    problem.table_blocks = 3;
    problem.cache_rows = 3;
    features.cache.block_table = {0, missing, 2};
    EXPECT_EQ(Line(problem, features).appended(), (std::vector<float>{0, 1, 0, 0, 4, 5})) << missing;
  }
}

// The later sequence wins, for any number of threads. ThreadSanitizer sees a race if two of them ever take one slot.
TEST(AppendSlots, OfTwoSequencesThatShareARowAreWrittenInOrder) {
  for (const Storage& storage : storages()) {
    AttentionProblem problem = cached_problem(3, 1, 400, 64, 64);
    problem.seqlen_new = 390;
    Features features;
    storage.apply(problem, features);
    features.seqused_k = {0, 5, 10};
    features.cache.batch_idx = {1, 1, 1};
    for (int threads : {1, 2, 5}) {
      cpu::set_thread_count_for_testing(threads);
      TestCall call(problem, features, 42);
      EXPECT_EQ(check_append(call), "") << storage.name << ", " << threads << " threads";
    }
  }
  cpu::set_thread_count_for_testing(0);
}

TEST(AppendSlots, OfPagesThatRowsShareAreWrittenInOrder) {
  AttentionProblem problem = cached_problem(2, 1, 512, 64, 64);
  problem.seqlen_new = 500;
  Features features;
  features.seqused_k = {0, 3};
  make_pages(problem, features, 64);
  for (std::int32_t& page : features.cache.block_table) page = page % 3;
  for (int threads : {1, 4}) {
    cpu::set_thread_count_for_testing(threads);
    TestCall call(problem, features, 43);
    EXPECT_EQ(check_append(call), "") << threads << " threads";
  }
  cpu::set_thread_count_for_testing(0);
}

// A quarter turn at every angle: (x, y) becomes (-y, x).
class Rotation : public testing::TestWithParam<bool> {
 protected:
  static TestCall quarter_turn(std::int32_t head_dim, std::int32_t rotary_dim) {
    AttentionProblem problem = cached_problem(1, 1, 4, head_dim, 1);
    problem.heads_q = problem.heads_k = 1;
    problem.seqlen_new = 1;
    problem.rotary_dim = rotary_dim;
    problem.rotary_interleaved = GetParam();
    problem.rotary_rows = 4;
    Features features;
    features.seqused_k = {0};
    TestCall call(problem, features, 44);
    auto* cos = static_cast<float*>(const_cast<void*>(call.rotary.cos));
    auto* sin = static_cast<float*>(const_cast<void*>(call.rotary.sin));
    for (std::int64_t row = 0; row < 4; ++row) {
      for (std::int64_t t = 0; t < rotary_dim / 2; ++t) {
        cos[row * call.rotary.cos_stride + t] = 0.0f;
        sin[row * call.rotary.sin_stride + t] = 1.0f;
      }
    }
    for (std::int32_t d = 0; d < head_dim; ++d) {
      static_cast<float*>(const_cast<void*>(call.new_keys.k.data))[d] = static_cast<float>(d + 1);
      static_cast<float*>(call.q.data)[d] = static_cast<float>(d + 1);
    }
    return call;
  }
};

TEST_P(Rotation, PairsNeighboursOrHalvesAndLeavesTheOtherDims) {
  TestCall call = quarter_turn(6, 4);
  cpu::append(call.problem, call.inputs, call.new_keys, call.rotary, call.cache);
  cpu::rotate_queries(call.problem, call.inputs, call.rotary, call.rotated);
  const std::vector<float> expected =
      GetParam() ? std::vector<float>{-2, 1, -4, 3, 5, 6} : std::vector<float>{-3, -4, 1, 2, 5, 6};
  const auto row_of = [](const cpu::Tensor& tensor) {
    const auto* row = static_cast<const float*>(tensor.data);
    return std::vector<float>(row, row + 6);
  };
  EXPECT_EQ(row_of(call.cache.k), expected);
  EXPECT_EQ(row_of(call.rotated), expected);
}

TEST_P(Rotation, NeverTurnsValues) {
  TestCall call = quarter_turn(2, 2);
  cpu::append(call.problem, call.inputs, call.new_keys, call.rotary, call.cache);
  EXPECT_EQ(*static_cast<const float*>(call.cache.v.data), *static_cast<const float*>(call.new_keys.v.data));
}

INSTANTIATE_TEST_SUITE_P(Pairings, Rotation, testing::Bool(),
                         [](const auto& info) { return info.param ? "interleaved" : "halves"; });

// Row `position` of the table turns by `position` quarter turns, so that the turn of a row tells its position.
std::vector<int> turns_of_queries(AttentionProblem problem, std::int32_t length,
                                  const std::vector<std::int32_t>& rotary_seqlens) {
  problem.seqlen_new = 1;
  problem.rotary_dim = 2;
  problem.rotary_rows = 4;
  Features features;
  features.seqused_k = {length};
  features.cache.rotary_seqlens = rotary_seqlens;
  TestCall call(problem, features, 45);
  auto* cos = static_cast<float*>(const_cast<void*>(call.rotary.cos));
  auto* sin = static_cast<float*>(const_cast<void*>(call.rotary.sin));
  for (std::int64_t row = 0; row < 4; ++row) {
    cos[row * call.rotary.cos_stride] = row == 0 ? 1.0f : row == 2 ? -1.0f : 0.0f;
    sin[row * call.rotary.sin_stride] = row == 1 ? 1.0f : row == 3 ? -1.0f : 0.0f;
  }
  auto* q = static_cast<float*>(call.q.data);
  for (std::int64_t i = 0; i < query_rows(problem); ++i) q[2 * i] = 1.0f, q[2 * i + 1] = 0.0f;
  cpu::rotate_queries(call.problem, call.inputs, call.rotary, call.rotated);
  std::vector<int> turns;
  const auto* rotated = static_cast<const float*>(call.rotated.data);
  for (std::int64_t i = 0; i < query_rows(problem); ++i) {
    const float x = rotated[2 * i];
    const float y = rotated[2 * i + 1];
    turns.push_back(x == 1.0f ? 0 : y == 1.0f ? 1 : x == -1.0f ? 2 : y == -1.0f ? 3 : -1);
  }
  return turns;
}

AttentionProblem two_queries() {
  AttentionProblem problem = cached_problem(1, 2, 4, 2, 1);
  problem.heads_q = problem.heads_k = 1;
  return problem;
}

TEST(RotationOfQueries, IsAlikeWhereOrderDoesNotMatter) {
  EXPECT_EQ(turns_of_queries(two_queries(), 1, {}), (std::vector<int>{1, 1}));
}

TEST(RotationOfQueries, GoesOnOneByOneWhereAMaskDependsOnOrder) {
  AttentionProblem causal = two_queries();
  causal.causal = true;
  AttentionProblem left = two_queries();
  left.window_left = 0;
  AttentionProblem right = two_queries();
  right.window_right = 3;
  for (const AttentionProblem& problem : {causal, left, right}) {
    EXPECT_EQ(turns_of_queries(problem, 1, {}), (std::vector<int>{1, 2}));
  }
}

TEST(RotationOfQueries, StartsAtRotarySeqlensWhereGiven) {
  AttentionProblem problem = two_queries();
  problem.causal = true;
  EXPECT_EQ(turns_of_queries(problem, 1, {2}), (std::vector<int>{2, 3}));
}

TEST(RotationOfQueries, StopsAtTheLastAngle) {
  AttentionProblem problem = two_queries();
  problem.causal = true;
  constexpr std::int32_t highest = std::numeric_limits<std::int32_t>::max();
  EXPECT_EQ(turns_of_queries(problem, 1, {highest}), (std::vector<int>{3, 3}));
  EXPECT_EQ(turns_of_queries(problem, 1, {-highest}), (std::vector<int>{0, 1}));
}

// Appends one row of one head, quantised to `codes`, and gives it back in float32.
std::vector<double> round_trip(DType codes, const std::vector<float>& row) {
  const auto dim = static_cast<std::int32_t>(row.size());
  AttentionProblem problem = cached_problem(1, 1, 1, dim, dim);
  problem.heads_q = problem.heads_k = 1;
  problem.seqlen_new = 1;
  Features features;
  features.seqused_k = {0};
  features.cache.k_codes = features.cache.v_codes = codes;
  TestCall call(problem, features, 46);
  std::copy(row.begin(), row.end(), static_cast<float*>(const_cast<void*>(call.new_keys.k.data)));
  cpu::append(call.problem, call.inputs, call.new_keys, call.rotary, call.cache);
  std::vector<double> decoded;
  for (std::int32_t d = 0; d < dim; ++d) decoded.push_back(read_key(call.inputs.k, call.inputs.cache.k, {0, 0, true}, 0, d));
  return decoded;
}

class QuantisedRow : public testing::TestWithParam<DType> {};

TEST_P(QuantisedRow, OfZerosStaysZero) {
  for (const double value : round_trip(GetParam(), std::vector<float>(64, 0.0f))) EXPECT_EQ(value, 0.0);
}

TEST_P(QuantisedRow, OfOneValueKeepsIt) {
  for (const float constant : {3.0f, -0.7f, 1e-3f, 1e5f}) {
    for (const double value : round_trip(GetParam(), std::vector<float>(64, constant))) {
      EXPECT_NEAR(value, constant, 1e-6 * std::abs(constant) + 1e-7);
    }
  }
}

TEST_P(QuantisedRow, KeepsItsLargestMagnitude) {
  for (const float largest : {2.0f, -2.0f}) {
    std::vector<float> row;
    for (int d = 0; d < 64; ++d) row.push_back(0.9f * std::sin(static_cast<float>(d)));
    row[17] = largest;
    EXPECT_NEAR(round_trip(GetParam(), row)[17], largest, 1e-6);
  }
}

TEST_P(QuantisedRow, HasItsLargestMagnitudeInAnyGroup) {
  std::vector<float> row(192, 0.25f);
  row[0] = -1.0f;
  row[191] = 1.0f;
  const std::vector<double> decoded = round_trip(GetParam(), row);
  EXPECT_NEAR(decoded[0], -1.0, 1e-6);
  EXPECT_NEAR(decoded[191], 1.0, 1e-6);
}

// Nothing that a caller appends may be undefined behaviour.
TEST_P(QuantisedRow, TakesAnyFloat) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const float odd :
       {nan, infinity, -infinity, std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min()}) {
    std::vector<float> row(64, 0.5f);
    row[3] = odd;
    round_trip(GetParam(), row);
    round_trip(GetParam(), std::vector<float>(64, odd));
  }
}

INSTANTIATE_TEST_SUITE_P(Codes, QuantisedRow, testing::Values(DType::int8, DType::affine8, DType::affine4),
                         [](const auto& info) {
                           return info.param == DType::int8 ? "int8" : info.param == DType::affine8 ? "affine8" : "affine4";
                         });

}  // namespace
}  // namespace flash_attn::test
