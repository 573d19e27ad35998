// Random problems, every feature in any combination, on every level in turn.

#include <gtest/gtest.h>

#include "cpu/isa.h"
#include "random_problem.h"

namespace flash_attn::test {
namespace {

constexpr std::int64_t work = 400000;
constexpr std::uint64_t problems = 400;

class Random : public testing::Test {
 protected:
  void TearDown() override { cpu::force_isa_level_for_testing(nullptr); }

  template <class Draw, class Check>
  void check_problems(std::uint64_t first_seed, Draw draw, Check check) {
    for (std::uint64_t seed = first_seed; seed < first_seed + problems; ++seed) {
      const std::vector<std::uint8_t> bytes = random_bytes(seed, 1024);
      ByteSource source(bytes.data(), bytes.size());
      TestCall call = draw(source, work);
      const char* level = cpu::isa_level_name(static_cast<int>(seed % static_cast<std::uint64_t>(cpu::isa_level_count())));
      ASSERT_TRUE(cpu::force_isa_level_for_testing(level));
      EXPECT_EQ(check(call), "") << "seed " << seed << ", level " << level;
    }
  }
};

TEST_F(Random, ForwardMatchesTheReference) { check_problems(0, random_call, check_forward); }

TEST_F(Random, BackwardMatchesTheReference) { check_problems(100000, random_call, check_backward); }

TEST_F(Random, CachedMatchesTheReference) { check_problems(200000, random_cached_call, check_cached); }

}  // namespace
}  // namespace flash_attn::test
