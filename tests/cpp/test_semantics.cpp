// src/semantics against its definitions, by brute force.

#include <gtest/gtest.h>

#include <algorithm>
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
#include "semantics/paging.h"
#include "semantics/quantization.h"
#include "semantics/rotary.h"
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

TEST(CachedSequence, AnyLengthsStayInsideTheRow) {
  const int32 values[] = {lowest, -1, 0, 1, 4, 9, 10, 11, highest};
  for (int32 length : values) {
    for (int32 leftpad : values) {
      for (int32 row : {lowest, -1, 0, 1, 2, highest}) {
        for (int32 new_end : values) {
          for (int32 page_size : {0, 4}) {
            AttentionProblem problem;
            problem.batch = problem.cache_rows = 1;
            problem.cached = true;
            problem.max_seqlen_q = 1;
            problem.max_seqlen_k = 10;
            problem.page_size = page_size;
            problem.table_rows = 2;
            problem.table_blocks = 2;
            problem.total_new = 3;
            const int32 new_starts[] = {1, new_end};
            cpu::AttentionInputs inputs;
            inputs.seqused_k = &length;
            inputs.cache.leftpad = &leftpad;
            inputs.cache.batch_idx = &row;
            inputs.cache.cu_seqlens_new = new_starts;
            const int32 capacity = page_size ? 8 : 10;
            const cpu::Sequence sequence = cpu::sequences_of(problem, inputs)[0];
            ASSERT_GE(sequence.k.begin, 0);
            ASSERT_GE(sequence.k.length, 0);
            ASSERT_LE(sequence.k.begin + sequence.k.length, capacity);
            ASSERT_GE(sequence.cache_row, 0);
            ASSERT_LT(sequence.cache_row, page_size ? 2 : 1);
            const Extent new_keys = cpu::new_keys_of(problem, inputs, 0);
            ASSERT_TRUE(0 <= new_keys.begin && 0 <= new_keys.length && new_keys.begin + new_keys.length <= 3);
          }
        }
      }
    }
  }
}

TEST(CachedSequence, HasWhatTheCacheHoldsAndWhatIsAppendedLessTheLeftpad) {
  AttentionProblem problem;
  problem.batch = problem.cache_rows = 1;
  problem.cached = true;
  problem.max_seqlen_q = 1;
  problem.max_seqlen_k = 100;
  problem.seqlen_new = 5;
  const int32 length = 40;
  const int32 leftpad = 7;
  cpu::AttentionInputs inputs;
  inputs.seqused_k = &length;
  inputs.cache.leftpad = &leftpad;
  const cpu::Sequence sequence = cpu::sequences_of(problem, inputs)[0];
  EXPECT_EQ(sequence.k.begin, 7);
  EXPECT_EQ(sequence.k.length, 40 + 5 - 7);
}

TEST(Paging, SlotsFillOnePageAfterTheOther) {
  for (int32 page_size : {1, 2, 7, 16, 256}) {
    int32 slot = 0;
    for (int32 entry = 0; entry < 3; ++entry) {
      for (int32 row = 0; row < page_size; ++row, ++slot) {
        const PageSlot place = page_slot(slot, page_size);
        ASSERT_EQ(place.entry, entry);
        ASSERT_EQ(place.row, row);
      }
    }
  }
}

TEST(Paging, OnlyIdsInsideTheCacheNameAPage) {
  for (int32 page : {0, 1, 2}) EXPECT_TRUE(page_exists(page, 3)) << page;
  for (int32 page : {-1, 3, lowest, highest}) EXPECT_FALSE(page_exists(page, 3)) << page;
  EXPECT_FALSE(page_exists(0, 0));
}

TEST(Rotary, TurnsByTheAngle) {
  for (double angle : {0.0, 0.3, 1.0, 2.0, -2.5}) {
    for (double start : {0.0, 0.7, 3.0}) {
      const RotaryPair<double> x = {2 * std::cos(start), 2 * std::sin(start)};
      const RotaryPair<double> turned = rotate(x, std::cos(angle), std::sin(angle));
      EXPECT_NEAR(turned.first, 2 * std::cos(start + angle), 1e-15);
      EXPECT_NEAR(turned.second, 2 * std::sin(start + angle), 1e-15);
    }
  }
}

// What makes it a position embedding: a product depends on the distance alone.
TEST(Rotary, ProductsDependOnTheDistanceOfPositions) {
  const auto product = [](int query, int key) {
    const auto at = [](RotaryPair<double> x, int position) {
      return rotate(x, std::cos(0.1 * position), std::sin(0.1 * position));
    };
    const RotaryPair<double> q = at({0.3, -1.2}, query);
    const RotaryPair<double> k = at({0.8, 0.5}, key);
    return q.first * k.first + q.second * k.second;
  };
  EXPECT_NEAR(product(7, 3), product(104, 100), 1e-13);
  EXPECT_GT(std::abs(product(7, 3) - product(8, 3)), 1e-2);
}

TEST(Rotary, QueriesTurnOneByOneOnlyWhereTheirOrderMatters) {
  EXPECT_EQ(rotary_position_of_key(10, 3), 13);
  EXPECT_EQ(rotary_position_of_query(10, 3, false, -1, -1), 10);
  EXPECT_EQ(rotary_position_of_query(10, 3, true, -1, -1), 13);
  EXPECT_EQ(rotary_position_of_query(10, 3, false, 0, -1), 13);
  EXPECT_EQ(rotary_position_of_query(10, 3, false, -1, 0), 13);
}

TEST(Quantization, Int8ReachesTheLargestMagnitude) {
  for (float largest : {0.0f, 1e-30f, 0.5f, 1.0f, 1000.0f}) EXPECT_NEAR(127.0f * int8_scale(largest), largest, 1e-6f * largest);
}

TEST(Quantization, AffineHasTheEndOfLargerMagnitudeExactlyAndReachesTheOther) {
  std::mt19937 bits(7);
  std::uniform_real_distribution<float> uniform(-3.0f, 3.0f);
  for (int largest_code : {15, 255}) {
    for (int i = 0; i < 10000; ++i) {
      const float a = uniform(bits);
      const float b = uniform(bits);
      const float low = std::min(a, b);
      const float high = std::max(a, b);
      const AffineScale affine = affine_scale(low, high, largest_code);
      const bool from_below = std::abs(low) > std::abs(high);
      const float edge = from_below ? low : high;
      const float other = from_below ? high : low;
      ASSERT_EQ(affine.scale > 0.0f, from_below);
      // Code 0 is the edge; 0 is a code; and the other end is at most one step past the last code.
      const float step = std::abs(affine.scale);
      ASSERT_EQ(dequantized(0.0f, affine.scale, affine.bias), edge);
      const float code_of_zero = -affine.bias / affine.scale;
      ASSERT_NEAR(code_of_zero, std::round(code_of_zero), 1e-3f * std::max(1.0f, std::abs(code_of_zero) / 16.0f));
      ASSERT_LT(std::abs((other - affine.bias) / affine.scale), static_cast<float>(largest_code) + 1.01f);
      ASSERT_LT(step, (high - low) / static_cast<float>(largest_code - 1) + 1e-6f);
    }
  }
}

TEST(Quantization, AffineOfOneValueIsThatValue) {
  for (float constant : {0.0f, 1.0f, -2.5f, 1e-6f, 3e4f}) {
    const AffineScale affine = affine_scale(constant, constant, 15);
    EXPECT_GT(std::abs(affine.scale), 0.0f);
    EXPECT_EQ(dequantized(0.0f, affine.scale, affine.bias), constant);
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

TEST(Element, CodesComeBackAsTheyWereWrittenAndLeaveTheirNeighbours) {
  for (DType dtype : {DType::int8, DType::affine8, DType::affine4}) {
    std::array<std::uint32_t, 16> row;
    row.fill(0xFFFFFFFFu);
    const int lowest_code = test::lowest_code(dtype);
    const int codes = test::highest_code(dtype) - lowest_code + 1;
    for (int d = 0; d < 32; ++d) test::write_code(row.data(), dtype, 1, d, lowest_code + d * 37 % codes);
    for (int d = 0; d < 32; ++d) EXPECT_EQ(test::read_code(row.data(), dtype, 1, d), lowest_code + d * 37 % codes);
  }
  std::uint32_t word = 0;
  test::write_code(&word, DType::affine4, 0, 1, 0xA);
  EXPECT_EQ(word, 0xA0u);
  test::write_code(&word, DType::affine8, 0, 3, 0x7F);
  EXPECT_EQ(word, 0x7F0000A0u);
}

}  // namespace
}  // namespace flash_attn
