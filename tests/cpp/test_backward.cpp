// cpu::backward against the scalar reference, and the promises that a comparison alone would not show.

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

class BackwardFeature : public testing::TestWithParam<std::tuple<Case, DType, bool>> {};

TEST_P(BackwardFeature, MatchesTheReference) {
  AttentionProblem problem = dense_problem(2, 37, 133, 24, 40);
  Features features;
  std::get<Case>(GetParam()).apply(problem, features);
  problem.dtype = std::get<DType>(GetParam());
  features.dlse = std::get<bool>(GetParam());
  TestCall call(problem, features, 3);
  EXPECT_EQ(check_backward(call), "");
}

INSTANTIATE_TEST_SUITE_P(All, BackwardFeature,
                         testing::Combine(testing::ValuesIn(feature_cases()), testing::ValuesIn(dtypes), testing::Bool()),
                         [](const auto& info) {
                           return std::string(std::get<Case>(info.param).name) + "_" + name_of(std::get<DType>(info.param)) +
                                  (std::get<bool>(info.param) ? "_dlse" : "");
                         });

struct Shape {
  std::int32_t seqlen_q, seqlen_k, head_dim, head_dim_v;
};

void PrintTo(const Shape& shape, std::ostream* stream) {
  *stream << shape.seqlen_q << "x" << shape.seqlen_k << ", dims " << shape.head_dim << " and " << shape.head_dim_v;
}

const Shape shapes[] = {
    {0, 5, 8, 8},      {5, 0, 8, 8},       {0, 0, 8, 8},       {1, 1, 1, 1},       {1, 1, 576, 512},
    {1, 300, 64, 64},  {300, 1, 64, 64},   {2, 3, 5, 7},       {12, 24, 16, 16},   {11, 23, 15, 17},
    {13, 25, 17, 15},  {24, 72, 32, 32},   {47, 119, 33, 31},  {48, 120, 64, 8},   {49, 121, 8, 64},
    {241, 100, 3, 3},  {96, 96, 128, 128}, {20, 73, 161, 160}, {145, 7, 192, 128}, {9, 71, 256, 256},
    {5, 75, 576, 512}, {3, 10, 1, 576},    {3, 10, 576, 1},    {449, 801, 72, 48}, {193, 257, 96, 96},
};

class BackwardShape : public testing::TestWithParam<std::tuple<Shape, bool, DType>> {};

TEST_P(BackwardShape, MatchesTheReference) {
  const auto& [shape, causal, dtype] = GetParam();
  AttentionProblem problem = dense_problem(1, shape.seqlen_q, shape.seqlen_k, shape.head_dim, shape.head_dim_v);
  problem.causal = causal;
  problem.dtype = dtype;
  problem.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  TestCall call(problem, {}, 4);
  EXPECT_EQ(check_backward(call), "");
}

INSTANTIATE_TEST_SUITE_P(All, BackwardShape,
                         testing::Combine(testing::ValuesIn(shapes), testing::Bool(),
                                          testing::Values(DType::float32, DType::bfloat16)));

TEST(Backward, NoBatchIsNoWork) {
  TestCall call(dense_problem(0, 8, 8, 4, 4), {}, 5);
  EXPECT_EQ(check_backward(call), "");
}

TEST(Backward, NoBatchHasAZeroSinkGradient) {
  Features features;
  features.sink = true;
  TestCall call(dense_problem(0, 8, 8, 4, 4), features, 5);
  EXPECT_EQ(check_backward(call), "");
}

TEST(Backward, ARowWithoutKeysGivesZeroGradients) {
  AttentionProblem problem = dense_problem(1, 5, 3, 4, 4);
  problem.causal = true;
  Features features;
  features.dlse = true;
  TestCall call(problem, features, 6);
  EXPECT_EQ(check_backward(call), "");
  const auto* dq = static_cast<const float*>(call.gradients.dq.data);
  for (int i = 0; i < 2 * 4 * 4; ++i) EXPECT_EQ(dq[i], 0.0f);
}

TEST(Backward, ARowWithoutKeysPassesItsLseCotangentToTheSink) {
  Features features;
  features.sink = features.dlse = true;
  features.seqused_k = {0};
  TestCall call(dense_problem(1, 1, 4, 4, 4), features, 7);
  EXPECT_EQ(check_backward(call), "");
  for (int head = 0; head < 4; ++head) EXPECT_FLOAT_EQ(call.gradients.dsink[head], call.saved.dlse[head]);
}

TEST(Backward, AGradientThatNobodyWantsChangesNoOther) {
  AttentionProblem problem = dense_problem(2, 30, 50, 16, 8);
  Features features;
  features.sink = features.attn_mask = true;
  features.mask_dtype = DType::float32;
  TestCall call(problem, features, 8);
  ASSERT_EQ(check_backward(call), "");
  const cpu::Gradients wanted = call.gradients;
  const auto bytes_of = [](const void* data, std::size_t size) { return std::string(static_cast<const char*>(data), size); };
  const auto all = [&] {
    return std::vector<std::string>{bytes_of(wanted.dq.data, 2 * 30 * 4 * 16 * 4),
                                    bytes_of(wanted.dk.data, 2 * 50 * 2 * 16 * 4), bytes_of(wanted.dv.data, 2 * 50 * 2 * 8 * 4),
                                    bytes_of(wanted.dsink, 4 * 4), bytes_of(wanted.dmask, 2 * 4 * 30 * 50 * 4)};
  };
  const std::vector<std::string> before = all();
  for (int unwanted = 0; unwanted < 32; ++unwanted) {
    cpu::Gradients gradients = wanted;
    if (unwanted & 1) gradients.dq.data = nullptr;
    if (unwanted & 2) gradients.dk.data = nullptr;
    if (unwanted & 4) gradients.dv.data = nullptr;
    if (unwanted & 8) gradients.dsink = nullptr;
    if (unwanted & 16) gradients.dmask = nullptr;
    std::memset(wanted.dsink, 0xFF, 4 * 4);
    cpu::backward(problem, call.inputs, call.saved, gradients);
    std::vector<std::string> expected = before;
    if (unwanted & 8) expected[3] = std::string(4 * 4, '\xFF');
    EXPECT_EQ(all(), expected) << unwanted;
  }
}

TEST(Backward, WritesNothingBetweenTheRowsOfAGradient) {
  AttentionProblem problem = dense_problem(2, 30, 30, 10, 10);
  Features features;
  features.out = Layout::gaps;
  TestCall call(problem, features, 11);
  ASSERT_EQ(check_backward(call), "");
  const auto expect_gaps = [](const cpu::Tensor& gradient, std::int64_t rows) {
    for (std::int64_t i = 0; i < (rows - 1) * 13 + 10; ++i) {
      ASSERT_EQ(std::isnan(read_element(gradient.data, gradient.dtype, i)), i % 13 >= 10) << i;
    }
  };
  expect_gaps(call.gradients.dq, 2 * 30 * 4);
  expect_gaps(call.gradients.dk, 2 * 30 * 2);
  expect_gaps(call.gradients.dv, 2 * 30 * 2);
}

TEST(Backward, AnAdditiveMaskOfMinusInfinityGetsNoGradient) {
  Features features;
  features.attn_mask = true;
  features.mask_dtype = DType::float32;
  TestCall call(dense_problem(1, 3, 50, 4, 4), features, 9);
  auto* mask = static_cast<float*>(const_cast<void*>(call.attn_mask.data));
  for (int i = 0; i < 4 * 3 * 50; ++i) mask[i] = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(check_backward(call), "");
  for (int i = 0; i < 4 * 3 * 50; ++i) EXPECT_EQ(call.gradients.dmask[i], 0.0f);
}

}  // namespace
}  // namespace flash_attn::test
