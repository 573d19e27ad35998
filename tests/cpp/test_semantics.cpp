// src/semantics against its definitions, by brute force.

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/sequences.h"
#include "element.h"
#include "semantics/dropout.h"
#include "semantics/mask.h"
#include "semantics/sequence.h"

namespace flash_attn {
namespace {

constexpr int32 highest = std::numeric_limits<int32>::max();
constexpr int32 lowest = std::numeric_limits<int32>::min();

// The definition, in arithmetic that cannot overflow.
bool sees(MaskRule rule, std::int64_t row, std::int64_t key) {
  const std::int64_t diagonal = row + rule.seqlen_k - rule.seqlen_q;
  if (key < 0 || key >= rule.seqlen_k) return false;
  if (rule.window_left >= 0 && key < diagonal - rule.window_left) return false;
  if (rule.window_right >= 0 && key > diagonal + rule.window_right) return false;
  if (rule.attention_chunk > 0) {
    if (diagonal < 0) return false;
    const std::int64_t chunk = diagonal / rule.attention_chunk;
    if (key / rule.attention_chunk != chunk) return false;
  }
  return true;
}

template <class Visit>
void for_each_rule(Visit visit) {
  for (int32 seqlen_q : {0, 1, 2, 3, 5, 8}) {
    for (int32 seqlen_k : {0, 1, 2, 4, 7}) {
      for (int32 left : {-1, lowest, 0, 1, 2, 6, highest, highest - 1, highest - 7}) {
        for (int32 right : {-1, lowest, 0, 1, 3, highest, highest - 1, highest - 7}) {
          for (int32 chunk : {0, 1, 2, 3, 5, highest, highest - 1}) visit(MaskRule{seqlen_q, seqlen_k, left, right, chunk});
        }
      }
    }
  }
}

std::string describe(MaskRule rule) {
  return "seqlen_q " + std::to_string(rule.seqlen_q) + ", seqlen_k " + std::to_string(rule.seqlen_k) + ", window " +
         std::to_string(rule.window_left) + " " + std::to_string(rule.window_right) + ", chunk " +
         std::to_string(rule.attention_chunk);
}

TEST(Mask, VisibleKeysAreExactlyThoseOfTheDefinition) {
  for_each_rule([](MaskRule rule) {
    for (int32 row = 0; row < rule.seqlen_q; ++row) {
      const KeyRange keys = visible_keys(rule, row);
      for (int32 key = -2; key < rule.seqlen_k + 2; ++key) {
        ASSERT_EQ(keys.begin <= key && key < keys.end, sees(rule, row, key))
            << describe(rule) << ", row " << row << ", key " << key;
      }
    }
  });
}

TEST(Mask, RangeOfRowsCoversEveryKeyThatOneOfThemSees) {
  for_each_rule([](MaskRule rule) {
    for (int32 begin = 0; begin <= rule.seqlen_q; ++begin) {
      for (int32 end = begin; end <= rule.seqlen_q; ++end) {
        const KeyRange keys = visible_keys_of_rows(rule, begin, end);
        for (int32 row = begin; row < end; ++row) {
          for (int32 key = 0; key < rule.seqlen_k; ++key) {
            ASSERT_TRUE(!sees(rule, row, key) || (keys.begin <= key && key < keys.end)) << describe(rule);
          }
        }
      }
    }
  });
}

TEST(Mask, AllVisibleMeansThatNoKeyOfTheTileIsHidden) {
  for_each_rule([](MaskRule rule) {
    for (int32 row_begin = 0; row_begin < rule.seqlen_q; ++row_begin) {
      for (int32 row_end = row_begin + 1; row_end <= rule.seqlen_q; ++row_end) {
        for (int32 key_begin = 0; key_begin < rule.seqlen_k; ++key_begin) {
          for (int32 key_end = key_begin + 1; key_end <= rule.seqlen_k; ++key_end) {
            bool all = true;
            for (int32 row = row_begin; row < row_end; ++row) {
              for (int32 key = key_begin; key < key_end; ++key) all = all && sees(rule, row, key);
            }
            ASSERT_EQ(all_visible(rule, row_begin, row_end, {key_begin, key_end}), all) << describe(rule);
          }
        }
      }
    }
  });
}

TEST(Mask, EndsNeverMoveLeftAsTheRowGrows) {
  for_each_rule([](MaskRule rule) {
    for (int32 row = 0; row + 1 < rule.seqlen_q; ++row) {
      const KeyRange here = visible_keys(rule, row);
      const KeyRange next = visible_keys(rule, row + 1);
      ASSERT_TRUE(here.begin <= next.begin && here.end <= next.end) << describe(rule) << ", row " << row;
    }
  });
}

TEST(Mask, LongSequencesDoNotOverflow) {
  for (int32 seqlen_k : {highest, highest / 2 + 7, 1}) {
    for (int32 left : {-1, 0, 5, highest}) {
      for (int32 chunk : {0, 7, highest}) {
        const MaskRule rule = {highest, seqlen_k, left, 0, chunk};
        for (int32 row : {0, 1, highest / 2, highest - 2, highest - 1}) {
          const KeyRange keys = visible_keys(rule, row);
          const std::int64_t diagonal = std::int64_t{row} + seqlen_k - highest;
          for (std::int64_t key : {std::int64_t{0}, diagonal - 6, diagonal - 5, diagonal - 1, diagonal, diagonal + 1}) {
            ASSERT_EQ(keys.begin <= key && key < keys.end, sees(rule, row, key))
                << describe(rule) << ", row " << row << ", key " << key;
          }
        }
      }
    }
  }
}

TEST(Mask, CausalOverridesTheRightWindow) {
  EXPECT_EQ(causal_window_right(true, -1), 0);
  EXPECT_EQ(causal_window_right(true, 5), 0);
  EXPECT_EQ(causal_window_right(false, 5), 5);
}

using Counter = std::array<uint32, 4>;
using Key = std::array<uint32, 2>;

Counter philox(Counter counter, Key key) {
  const PhiloxWords<uint32> words = philox4x32_7<uint32>({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
  return {words.x, words.y, words.z, words.w};
}

// Random123's kat_vectors, "philox4x32 7".
TEST(Philox, GivesThePublishedAnswers) {
  constexpr uint32 ones = 0xffffffffu;
  EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}), (Counter{0x5f6fb709u, 0x0d893f64u, 0x4f121f81u, 0x4f730a48u}));
  EXPECT_EQ(philox({ones, ones, ones, ones}, {ones, ones}), (Counter{0x5207ddc2u, 0x45165e59u, 0x4d8ee751u, 0x8c52f662u}));
  EXPECT_EQ(philox({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, {0xa4093822u, 0x299f31d0u}),
            (Counter{0x4dfccabau, 0x190a87f0u, 0xc47362bau, 0xb6b5242au}));
}

TEST(Dropout, EveryElementOfATileHasItsOwnByte) {
  std::set<std::tuple<uint32, uint32, uint32>> bytes;
  for (uint32 row = 0; row < 16; ++row) {
    for (uint32 column = 0; column < 32; ++column) {
      const uint32 counter = dropout_counter<uint32>(0, row, column);
      EXPECT_LT(counter, 32u);
      bytes.insert({counter, dropout_word_index(column), dropout_byte_shift(row, column)});
    }
  }
  EXPECT_EQ(bytes.size(), 512u);
}

// spec: lane = (r % 8) * 4 + (c % 8) / 2; byte = (c / 16) * 8 + ((c / 8) % 2) * 4 + (r / 8) * 2 + c % 2
TEST(Dropout, TileMapIsUpstreams) {
  for (uint32 row = 0; row < 16; ++row) {
    for (uint32 column = 0; column < 32; ++column) {
      EXPECT_EQ(dropout_counter<uint32>(64, row, column), 64 + (row % 8) * 4 + (column % 8) / 2);
      const uint32 byte = dropout_word_index(column) * 4 + dropout_byte_shift(row, column) / 8;
      EXPECT_EQ(byte, (column / 16) * 8 + ((column / 8) % 2) * 4 + (row / 8) * 2 + column % 2);
    }
  }
}

class DropoutProbability : public testing::TestWithParam<double> {};

TEST_P(DropoutProbability, ThresholdIsDitheredAroundTheExactKeepProbability) {
  const auto keep_24 = static_cast<uint32>(0x1p24 * (1.0 - GetParam()));
  const double exact = keep_24 * 0x1p-16;
  std::mt19937 keys(1);
  constexpr int samples = 1 << 18;
  double sum = 0.0;
  for (int i = 0; i < samples; ++i) {
    const uint32 threshold = dropout_threshold<uint32>(keep_24, 5, 2, 3, keys(), keys());
    ASSERT_GE(threshold, static_cast<uint32>(std::floor(exact)));
    ASSERT_LE(threshold, static_cast<uint32>(std::ceil(exact)));
    sum += threshold;
  }
  // Five standard deviations of a mean of Bernoulli draws.
  EXPECT_NEAR(sum / samples, exact, 5 * 0.5 / std::sqrt(samples));
}

TEST_P(DropoutProbability, SharedByAllElementsOfAMask) {
  const auto keep_24 = static_cast<uint32>(0x1p24 * (1.0 - GetParam()));
  constexpr int rows = 256;
  constexpr int columns = 512;
  int kept = 0;
  for (uint32 row = 0; row < rows; ++row) {
    for (uint32 column = 0; column < columns; ++column) kept += dropout_keeps(keep_24, 123, 456, 96, row, column);
  }
  EXPECT_NEAR(static_cast<double>(kept) / (rows * columns), 1.0 - GetParam(), 5 * 0.5 / std::sqrt(rows * columns));
}

INSTANTIATE_TEST_SUITE_P(P, DropoutProbability, testing::Values(0.0, 1e-6, 0.001, 0.1, 0.17, 0.5, 0.9, 0.999));

TEST(Dropout, ZeroKeepsEverythingAndAlmostOneAlmostNothing) {
  int kept = 0;
  for (uint32 row = 0; row < 64; ++row) {
    for (uint32 column = 0; column < 64; ++column) {
      ASSERT_TRUE(dropout_keeps(1u << 24, 7, 8, 0, row, column));
      kept += dropout_keeps(0, 7, 8, 0, row, column);
    }
  }
  EXPECT_EQ(kept, 0);
}

TEST(Dropout, HeadsAndKeysDrawDifferentMasks) {
  const auto mask = [](uint32 key, uint32 head_offset) {
    std::vector<bool> keeps;
    for (uint32 i = 0; i < 512; ++i) keeps.push_back(dropout_keeps(1u << 23, key, 0, head_offset, i / 32, i % 32));
    return keeps;
  };
  EXPECT_EQ(mask(1, 0), mask(1, 0));
  EXPECT_NE(mask(1, 0), mask(2, 0));
  EXPECT_NE(mask(1, 0), mask(1, 32));
}

TEST(SequenceExtent, HonestLengthsAreTakenAsTheyAre) {
  const Extent extent = sequence_extent(3, 10, 3, 20, 8, highest);
  EXPECT_EQ(extent.begin, 3);
  EXPECT_EQ(extent.length, 7);
  EXPECT_EQ(sequence_extent(3, 10, 3, 20, 5, highest).length, 5);
  EXPECT_EQ(sequence_extent(3, 10, 3, 20, 8, 2).length, 2);
}

TEST(SequenceExtent, AnyCuSeqlensGiveDisjointExtentsInsideTheTensor) {
  const int32 values[] = {lowest, -1, 0, 1, 4, 9, 10, 11, highest};
  for (int32 a : values) {
    for (int32 b : values) {
      for (int32 c : values) {
        for (int32 used : {lowest, -1, 0, 3, highest}) {
          AttentionProblem problem;
          problem.varlen = true;
          problem.batch = 2;
          problem.total_q = problem.total_k = 10;
          problem.max_seqlen_q = problem.max_seqlen_k = 6;
          const int32 cu_seqlens[] = {a, b, c};
          const int32 seqused[] = {used, used};
          cpu::AttentionInputs inputs;
          inputs.cu_seqlens_q = inputs.cu_seqlens_k = cu_seqlens;
          inputs.seqused_q = seqused;
          int32 end = 0;
          for (const cpu::Sequence& sequence : cpu::sequences_of(problem, inputs)) {
            ASSERT_GE(sequence.q.begin, end);
            ASSERT_GE(sequence.q.length, 0);
            ASSERT_LE(sequence.q.length, 6);
            end = sequence.q.begin + sequence.q.length;
            ASSERT_LE(end, 10);
            ASSERT_LE(sequence.k.begin + sequence.k.length, 10);
          }
        }
      }
    }
  }
}

// The tests' own conversions, against the compiler's where it has them.
TEST(Element, RoundsToNearestEven) {
  float float32;
  std::uint16_t bits;
  for (double value : {0.0, 1.0, -1.5, 1e-40, 3.4e38, 1.0 + 0x1p-24, 1.0 + 0x1p-23, -0x1p-149, 0x1p-150}) {
    test::write_element(&float32, DType::float32, 0, value);
    EXPECT_EQ(float32, static_cast<float>(value));
    EXPECT_EQ(test::read_element(&float32, DType::float32, 0), double{static_cast<float>(value)});
  }
  const auto rounded = [&bits](DType dtype, double value) {
    test::write_element(&bits, dtype, 0, value);
    return bits;
  };
  EXPECT_EQ(rounded(DType::bfloat16, 1.0), 0x3f80);
  EXPECT_EQ(rounded(DType::bfloat16, 1.0 + 0x1p-8), 0x3f80);
  EXPECT_EQ(rounded(DType::bfloat16, 1.0 + 3 * 0x1p-8), 0x3f82);
  EXPECT_EQ(rounded(DType::float16, 65504.0), 0x7bff);
  EXPECT_EQ(rounded(DType::float16, 65520.0), 0x7c00);
  EXPECT_EQ(rounded(DType::float16, 1e9), 0x7c00);
  EXPECT_EQ(rounded(DType::float16, -0x1p-24), 0x8001);
  for (std::uint32_t pattern = 0; pattern < 0x7c01; ++pattern) {
    bits = static_cast<std::uint16_t>(pattern);
    ASSERT_EQ(rounded(DType::float16, test::read_element(&bits, DType::float16, 0)), pattern);
  }
}

}  // namespace
}  // namespace flash_attn
