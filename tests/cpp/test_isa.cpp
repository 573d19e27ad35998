// Every level that this machine runs, and every level's tile shapes in baseline instructions.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cases.h"
#include "cpu/isa.h"
#include "element.h"

namespace flash_attn::test {
namespace {

std::vector<std::string> level_names() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::isa_level_count(); ++i) names.push_back(cpu::isa_level_name(i));
  return names;
}

class IsaLevel : public testing::TestWithParam<std::tuple<std::string, Case>> {
 protected:
  void SetUp() override { ASSERT_TRUE(cpu::force_isa_level_for_testing(std::get<0>(GetParam()).c_str())); }
  void TearDown() override { cpu::force_isa_level_for_testing(nullptr); }

  TestCall call(DType dtype) {
    AttentionProblem problem = dense_problem(2, 53, 131, 40, 72);
    Features features;
    std::get<Case>(GetParam()).apply(problem, features);
    problem.dtype = dtype;
    return TestCall(problem, features, 20);
  }
};

TEST_P(IsaLevel, ForwardMatchesTheReference) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    TestCall test_call = call(dtype);
    EXPECT_EQ(check_forward(test_call), "") << name_of(dtype);
  }
}

TEST_P(IsaLevel, BackwardMatchesTheReference) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    TestCall test_call = call(dtype);
    EXPECT_EQ(check_backward(test_call), "") << name_of(dtype);
  }
}

INSTANTIATE_TEST_SUITE_P(All, IsaLevel, testing::Combine(testing::ValuesIn(level_names()), testing::ValuesIn(feature_cases())),
                         [](const auto& info) { return std::get<0>(info.param) + "_" + std::get<1>(info.param).name; });

// Scores so large that an error of bfloat16's square would show, and so many keys that no level takes another way for few.
TEST(Isa, EveryLevelKeepsTheBitsOfFloat32) {
  AttentionProblem problem = dense_problem(1, 320, 320, 64, 64);
  Features features;
  features.magnitude = 3.0;
  TestCall call(problem, features, 21);
  for (const std::string& level : level_names()) {
    ASSERT_TRUE(cpu::force_isa_level_for_testing(level.c_str()));
    EXPECT_EQ(check_forward(call), "") << level;
    EXPECT_EQ(check_backward(call), "") << level;
  }
  cpu::force_isa_level_for_testing(nullptr);
}

// Their last bits are below float32's normal numbers.
TEST(Isa, TinyValuesStayTiny) {
  AttentionProblem problem = dense_problem(1, 320, 320, 32, 32);
  TestCall call(problem, {}, 22);
  float largest = 0.0f;
  for (int i = 0; i < 320 * problem.heads_k * 32; ++i) {
    const double value = 1e-36 * read_element(call.v.data, DType::float32, i);
    write_element(call.v.data, DType::float32, i, value);
    largest = std::max(largest, static_cast<float>(std::abs(value)));
  }
  for (const std::string& level : level_names()) {
    ASSERT_TRUE(cpu::force_isa_level_for_testing(level.c_str()));
    cpu::forward(problem, call.inputs, call.outputs);
    for (int i = 0; i < 320 * problem.heads_q * 32; ++i) {
      ASSERT_LE(std::abs(read_element(call.outputs.out.data, DType::float32, i)), largest) << level;
    }
  }
  cpu::force_isa_level_for_testing(nullptr);
}

TEST(Isa, EveryMachineHasTheBaselineAndTheTileShapesOfTheBuild) {
  std::vector<const char*> expected = {"baseline"};
#if defined(FLASH_ATTN_TILE_LEVELS)
  expected.insert(expected.end(), {"avx2_tiles", "avx512_tiles", "avx512_bf16_tiles", "avx512_amx_tiles"});
#endif
#if defined(__aarch64__)
  expected.push_back("neon");
#endif
  for (const char* name : expected) EXPECT_TRUE(cpu::force_isa_level_for_testing(name)) << name;
  cpu::force_isa_level_for_testing(nullptr);
}

TEST(Isa, AnUnknownLevelIsRefusedByName) {
  EXPECT_FALSE(cpu::force_isa_level_for_testing("sse9"));
  setenv("FLASH_ATTENTION_MLX_ISA", "sse9", 1);
  try {
    cpu::kernels();
    ADD_FAILURE() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("sse9"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("baseline"), std::string::npos);
  }
  unsetenv("FLASH_ATTENTION_MLX_ISA");
}

TEST(Isa, TheEnvironmentIsReadAtEveryCall) {
  setenv("FLASH_ATTENTION_MLX_ISA", "baseline", 1);
  EXPECT_STREQ(cpu::isa_level_name(), "baseline");
  unsetenv("FLASH_ATTENTION_MLX_ISA");
  EXPECT_STREQ(cpu::isa_level_name(), cpu::isa_level_name(0));
}

}  // namespace
}  // namespace flash_attn::test
