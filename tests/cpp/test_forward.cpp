// cpu::forward against the scalar reference, and the promises that a comparison alone would not show.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "cases.h"
#include "element.h"

namespace flash_attn::test {
namespace {

constexpr DType dtypes[] = {DType::float32, DType::bfloat16, DType::float16};
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

class ForwardFeature : public testing::TestWithParam<std::tuple<Case, DType>> {};

TEST_P(ForwardFeature, MatchesTheReference) {
  AttentionProblem problem = dense_problem(2, 37, 133, 24, 40);
  Features features;
  std::get<Case>(GetParam()).apply(problem, features);
  problem.dtype = std::get<DType>(GetParam());
  TestCall call(problem, features, 3);
  EXPECT_EQ(check_forward(call), "");
}

INSTANTIATE_TEST_SUITE_P(All, ForwardFeature, testing::Combine(testing::ValuesIn(feature_cases()), testing::ValuesIn(dtypes)),
                         [](const auto& info) {
                           return std::string(std::get<Case>(info.param).name) + "_" + name_of(std::get<DType>(info.param));
                         });

struct Shape {
  std::int32_t seqlen_q, seqlen_k, head_dim, head_dim_v;
};

void PrintTo(const Shape& shape, std::ostream* stream) {
  *stream << shape.seqlen_q << "x" << shape.seqlen_k << ", dims " << shape.head_dim << " and " << shape.head_dim_v;
}

// Around the edges of every level's tiles, and at the limits of the interface.
const Shape shapes[] = {
    {0, 5, 8, 8},       {5, 0, 8, 8},      {0, 0, 8, 8},      {1, 1, 1, 1},     {1, 1, 576, 512},   {1, 300, 64, 64},
    {300, 1, 64, 64},   {2, 3, 5, 7},      {12, 24, 16, 16},  {11, 23, 15, 17}, {13, 25, 17, 15},   {24, 72, 32, 32},
    {47, 119, 33, 31},  {48, 120, 64, 8},  {49, 121, 8, 64},  {100, 241, 3, 3}, {96, 96, 128, 128}, {20, 73, 161, 160},
    {7, 145, 192, 128}, {9, 71, 256, 256}, {5, 75, 576, 512}, {3, 10, 1, 576},  {3, 10, 576, 1},
};

class ForwardShape : public testing::TestWithParam<std::tuple<Shape, bool, DType>> {};

TEST_P(ForwardShape, MatchesTheReference) {
  const auto& [shape, causal, dtype] = GetParam();
  AttentionProblem problem = dense_problem(1, shape.seqlen_q, shape.seqlen_k, shape.head_dim, shape.head_dim_v);
  problem.causal = causal;
  problem.dtype = dtype;
  problem.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  TestCall call(problem, {}, 4);
  EXPECT_EQ(check_forward(call), "");
}

INSTANTIATE_TEST_SUITE_P(All, ForwardShape,
                         testing::Combine(testing::ValuesIn(shapes), testing::Bool(),
                                          testing::Values(DType::float32, DType::bfloat16)));

TEST(Forward, NoBatchIsNoWork) {
  TestCall call(dense_problem(0, 8, 8, 4, 4), {}, 5);
  EXPECT_EQ(check_forward(call), "");
}

TEST(Forward, ARowWithoutKeysIsZeroAndItsLseMinusInfinity) {
  AttentionProblem problem = dense_problem(1, 5, 3, 4, 4);
  problem.causal = true;  // bottom-right: queries 0 and 1 come before every key
  TestCall call(problem, {}, 6);
  cpu::forward(problem, call.inputs, call.outputs);
  const auto* out = static_cast<const float*>(call.outputs.out.data);
  for (int i = 0; i < 2 * 4 * 4; ++i) EXPECT_EQ(out[i], 0.0f);
  for (int head = 0; head < 4; ++head) {
    EXPECT_EQ(call.outputs.lse[head * 5], -infinity);
    EXPECT_EQ(call.outputs.lse[head * 5 + 1], -infinity);
    EXPECT_TRUE(std::isfinite(call.outputs.lse[head * 5 + 2]));
  }
}

TEST(Forward, ARowWithoutKeysHasItsSinkAsLse) {
  Features features;
  features.sink = true;
  features.seqused_k = {0, 2};
  TestCall call(dense_problem(2, 3, 4, 4, 4), features, 7);
  EXPECT_EQ(check_forward(call), "");
  for (int head = 0; head < 4; ++head) EXPECT_FLOAT_EQ(call.outputs.lse[head * 3], call.sink[head]);
}

TEST(Forward, ASinkOfMinusInfinityIsNoSink) {
  Features features;
  features.sink = true;
  TestCall call(dense_problem(1, 3, 4, 4, 4), features, 7);
  for (int head = 0; head < 4; ++head) call.sink[head] = -infinity;
  EXPECT_EQ(check_forward(call), "");
}

TEST(Forward, NanInAKeyReachesOnlyTheRowsThatSeeIt) {
  AttentionProblem problem = dense_problem(1, 60, 60, 8, 8);
  problem.causal = true;
  TestCall call(problem, {}, 8);
  const std::int64_t last = 59 * call.k.strides.seq;
  for (int i = 0; i < 2 * 8; ++i) write_element(call.k.data, DType::float32, last + i, nan);
  cpu::forward(problem, call.inputs, call.outputs);
  const auto* out = static_cast<const float*>(call.outputs.out.data);
  for (int row = 0; row < 60; ++row) {
    for (int i = 0; i < 4 * 8; ++i) ASSERT_EQ(std::isnan(out[row * 4 * 8 + i]), row == 59) << row;
    for (int head = 0; head < 4; ++head) ASSERT_EQ(std::isnan(call.outputs.lse[head * 60 + row]), row == 59) << row;
  }
}

TEST(Forward, AMaskOfTheLowestFloatWeighsItsKeysAlike) {
  Features features;
  features.attn_mask = true;
  features.mask_dtype = DType::float32;
  TestCall call(dense_problem(1, 3, 50, 4, 4), features, 9);
  auto* mask = static_cast<float*>(const_cast<void*>(call.attn_mask.data));
  for (int i = 0; i < 4 * 3 * 50; ++i) mask[i] = std::numeric_limits<float>::lowest();
  const ReferenceForward reference = reference_forward(call.problem, call.inputs);
  cpu::forward(call.problem, call.inputs, call.outputs);
  const auto* out = static_cast<const float*>(call.outputs.out.data);
  for (int i = 0; i < 3 * 4 * 4; ++i) EXPECT_NEAR(out[i], reference.out.values[static_cast<std::size_t>(i)], 2e-5);
}

// Scores of about +-5000: the online maximum has to follow them, block after block.
TEST(Forward, HugeScoresStillSumToOne) {
  AttentionProblem problem = dense_problem(1, 40, 400, 16, 3);
  problem.softmax_scale = 1.0f;
  Features features;
  features.magnitude = 40.0;
  TestCall call(problem, features, 10);
  for (int i = 0; i < 400 * 2 * 3; ++i) write_element(call.v.data, DType::float32, i, 1.0);
  cpu::forward(problem, call.inputs, call.outputs);
  const auto* out = static_cast<const float*>(call.outputs.out.data);
  for (int i = 0; i < 40 * 4 * 3; ++i) ASSERT_NEAR(out[i], 1.0f, 1e-5f);
}

TEST(Forward, WritesNothingBetweenTheRowsOfOut) {
  for (DType dtype : dtypes) {
    AttentionProblem problem = dense_problem(2, 30, 30, 10, 10);
    problem.dtype = dtype;
    Features features;
    features.out = Layout::gaps;
    TestCall call(problem, features, 11);
    cpu::forward(problem, call.inputs, call.outputs);
    const std::int64_t rows = 2 * 30 * 4;
    const std::int64_t stride = call.outputs.out.strides.head;
    ASSERT_EQ(stride, 13);
    for (std::int64_t i = 0; i < (rows - 1) * stride + 10; ++i) {
      ASSERT_EQ(std::isnan(read_element(call.outputs.out.data, dtype, i)), i % stride >= 10) << i;
    }
  }
}

TEST(Forward, LseIsTakenBeforeDropout) {
  AttentionProblem problem = dense_problem(1, 20, 30, 8, 8);
  TestCall plain(problem, {}, 12);
  set_dropout(problem, 0.5);
  TestCall dropped(problem, {}, 12);
  cpu::forward(plain.problem, plain.inputs, plain.outputs);
  cpu::forward(dropped.problem, dropped.inputs, dropped.outputs);
  EXPECT_EQ(std::memcmp(plain.outputs.lse, dropped.outputs.lse, 4 * 20 * sizeof(float)), 0);
}

}  // namespace
}  // namespace flash_attn::test
