// cpu::forward of a few query rows over many keys: the path that reads K and V where they lie.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "call_parts.h"
#include "cases.h"
#include "cpu/buffer.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/sequences.h"
#include "element.h"

namespace flash_attn::test {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();

// Runs `check` of a fresh call on every level of this machine.
template <class MakeCall, class Check>
void check_on_every_level(MakeCall make_call, Check check) {
  for (int i = 0; i < cpu::isa_level_count(); ++i) {
    ASSERT_TRUE(cpu::force_isa_level_for_testing(cpu::isa_level_name(i)));
    TestCall call = make_call();
    EXPECT_EQ(check(call), "") << cpu::isa_level_name();
  }
  cpu::force_isa_level_for_testing(nullptr);
}

class DecodeFeature : public testing::TestWithParam<std::tuple<Case, DType>> {};

TEST_P(DecodeFeature, MatchesTheReference) {
  check_on_every_level(
      [] {
        AttentionProblem problem = dense_problem(2, 3, 133, 24, 40);
        Features features;
        std::get<Case>(GetParam()).apply(problem, features);
        problem.dtype = std::get<DType>(GetParam());
        problem.num_splits = 2;
        return TestCall(problem, features, 3);
      },
      check_forward);
}

INSTANTIATE_TEST_SUITE_P(All, DecodeFeature,
                         testing::Combine(testing::ValuesIn(feature_cases()),
                                          testing::Values(DType::float32, DType::bfloat16, DType::float16)),
                         [](const auto& info) {
                           return std::string(std::get<Case>(info.param).name) + "_" + name_of(std::get<DType>(info.param));
                         });

class DecodeCache : public testing::TestWithParam<std::tuple<Case, Storage>> {
 protected:
  static TestCall call(std::int32_t seqlen_q) {
    const Storage& storage = std::get<Storage>(GetParam());
    AttentionProblem problem = cached_problem(2, seqlen_q, 133, storage.head_dim(24), storage.head_dim(70));
    Features features;
    std::get<Case>(GetParam()).apply(problem, features);
    storage.apply(problem, features);
    return TestCall(problem, features, 4);
  }
};

TEST_P(DecodeCache, OfFewRowsMatchesTheReference) {
  check_on_every_level([] { return call(2); }, check_cached);
}

TEST_P(DecodeCache, OfManyRowsMatchesTheReference) {
  TestCall many = call(29);
  EXPECT_EQ(check_cached(many), "");
}

INSTANTIATE_TEST_SUITE_P(All, DecodeCache, testing::Combine(testing::ValuesIn(cache_cases()), testing::ValuesIn(storages())),
                         [](const auto& info) {
                           return std::string(std::get<Case>(info.param).name) + "_" + std::get<Storage>(info.param).name;
                         });

class DecodeGroup : public testing::TestWithParam<std::int32_t> {};

TEST_P(DecodeGroup, OfAnySizeMatchesTheReference) {
  for (const Storage& storage : storages()) {
    check_on_every_level(
        [&storage] {
          AttentionProblem problem = cached_problem(1, 1, 70, storage.head_dim(24), storage.head_dim(24));
          problem.heads_k = 3;
          problem.heads_q = 3 * GetParam();
          problem.causal = true;
          Features features;
          storage.apply(problem, features);
          return TestCall(problem, features, 5);
        },
        check_forward);
  }
}

INSTANTIATE_TEST_SUITE_P(Groups, DecodeGroup, testing::Range(1, 18));

class DecodeHeadDim : public testing::TestWithParam<std::int32_t> {};

TEST_P(DecodeHeadDim, NeedNotFillAVector) {
  for (const Storage& storage : storages()) {
    if (storage.head_dim(GetParam()) != GetParam()) continue;
    check_on_every_level(
        [&storage] {
          AttentionProblem problem = cached_problem(1, 1, 41, GetParam(), GetParam());
          problem.softmax_scale = 1.0f / std::sqrt(static_cast<float>(GetParam()));
          Features features;
          storage.apply(problem, features);
          return TestCall(problem, features, 6);
        },
        check_forward);
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, DecodeHeadDim,
                         testing::Values(1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 80, 95, 127, 128, 129,
                                         192, 255, 256, 320, 576));

TEST(Decode, HeadDimsOfKAndVAreTheirOwn) {
  for (const auto& [dim, dim_v] : {std::pair{1, 576}, {576, 1}, {17, 33}, {192, 128}, {5, 64}}) {
    check_on_every_level(
        [dim = dim, dim_v = dim_v] {
          AttentionProblem problem = cached_problem(1, 2, 30, dim, dim_v);
          problem.has_qv = true;
          problem.softmax_scale = 0.05f;
          return TestCall(problem, {}, 7);
        },
        check_forward);
  }
}

struct Result {
  std::vector<double> out;
  std::vector<double> lse;
};

Result result_of(const TestCall& call) {
  const AttentionProblem& problem = call.problem;
  cpu::forward(problem, call.inputs, call.outputs);
  Result result;
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    for (std::int64_t row = 0; row < problem.max_seqlen_q; ++row) {
      for (std::int64_t head = 0; head < problem.heads_q; ++head) {
        const std::int64_t offset = offset_of(call.outputs.out.strides, batch, row, head);
        for (std::int64_t d = 0; d < problem.head_dim_v; ++d) {
          result.out.push_back(read_element(call.outputs.out.data, problem.dtype, offset + d));
        }
        result.lse.push_back(call.outputs.lse[offset_of(call.outputs.lse_strides, batch, row, head)]);
      }
    }
  }
  return result;
}

void expect_near(const Result& got, const Result& want, const std::string& what) {
  ASSERT_EQ(got.out.size(), want.out.size());
  for (std::size_t i = 0; i < got.out.size(); ++i) ASSERT_NEAR(got.out[i], want.out[i], 1e-5) << what << ", out " << i;
  for (std::size_t i = 0; i < got.lse.size(); ++i) {
    ASSERT_TRUE(agree(got.lse[i], want.lse[i], 1e-5)) << what << ", lse " << i << ": " << got.lse[i] << ", " << want.lse[i];
  }
}

Features random_features(const char* name, AttentionProblem& problem) {
  Features features;
  for (const Case& test_case : feature_cases()) {
    if (std::string(test_case.name) == name) test_case.apply(problem, features);
  }
  return features;
}

// The row of a prefill has its keys in packed blocks, side by side with other rows; alone it reads them where they lie.
TEST(Decode, OfOneQueryGivesItsRowOfAPrefill) {
  for (const char* feature : {"plain", "softcap", "alibi", "sink", "left_window"}) {
    AttentionProblem problem = dense_problem(1, 60, 60, 24, 40);
    const Features features = random_features(feature, problem);
    problem.causal = true;
    TestCall prefill(problem, features, 8);
    const Result all = result_of(prefill);
    for (std::int32_t query = 0; query < 60; ++query) {
      TestCall alone(problem, features, 8);
      alone.problem.max_seqlen_q = 1;
      const std::int32_t keys = query + 1;
      alone.inputs.seqused_k = &keys;
      alone.inputs.q.data = static_cast<const float*>(alone.inputs.q.data) + query * alone.inputs.q.strides.seq;
      const Result one = result_of(alone);
      const Result expected = {{all.out.begin() + query * 4 * 40, all.out.begin() + (query + 1) * 4 * 40},
                               {all.lse.begin() + query * 4, all.lse.begin() + (query + 1) * 4}};
      expect_near(one, expected, std::string(feature) + ", query " + std::to_string(query));
    }
  }
}

class DecodeSplits : public testing::TestWithParam<Case> {};

TEST_P(DecodeSplits, ChangeNothingButRounding) {
  for (std::int32_t seqlen_q : {1, 2, 20}) {
    AttentionProblem problem = dense_problem(2, seqlen_q, 700, 24, 40);
    Features features;
    GetParam().apply(problem, features);
    if (problem.varlen) return;
    problem.num_splits = 1;
    TestCall call(problem, features, 9);
    const Result whole = result_of(call);
    for (std::int32_t splits : {0, 2, 3, 7, 100, 100000}) {
      call.problem.num_splits = splits;
      expect_near(result_of(call), whole, std::to_string(splits) + " splits, queries " + std::to_string(seqlen_q));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, DecodeSplits, testing::ValuesIn(feature_cases()),
                         [](const auto& info) { return std::string(info.param.name); });

// Long enough that keys are divided among threads: a task of a thread is a run of keys.
TEST(Decode, GivesTheSameBitsForAnyNumberOfThreads) {
  for (std::int32_t seqlen_q : {1, 20}) {
    for (const Storage& storage : storages()) {
      AttentionProblem problem = cached_problem(2, seqlen_q, 9000, 64, 64);
      Features features;
      features.sink = true;
      features.seqused_k = {9000, 4321};
      storage.apply(problem, features);
      TestCall call(problem, features, 10);
      cpu::set_thread_count_for_testing(1);
      const Result expected = result_of(call);
      for (int threads : {2, 3, 8}) {
        cpu::set_thread_count_for_testing(threads);
        const Result got = result_of(call);
        EXPECT_TRUE(got.out == expected.out && got.lse == expected.lse) << storage.name << ", " << threads << " threads";
      }
    }
  }
  cpu::set_thread_count_for_testing(0);
}

// A machine's caches choose among instances of the kernel, which differ in their blocks and in the order of keys.
TEST(Decode, GivesTheSameHoweverItReadsAhead) {
  for (int i = 0; i < cpu::isa_level_count(); ++i) {
    const cpu::Kernels& level = cpu::isa_level(i);
    for (const Storage& storage : storages()) {
      AttentionProblem problem = cached_problem(1, 1, 500, storage.head_dim(70), storage.head_dim(40));
      Features features;
      storage.apply(problem, features);
      TestCall call(problem, features, 12);
      const cpu::Sequence sequence = cpu::sequences_of(call.problem, call.inputs)[0];
      const MaskRule rule = problem.mask_rule(sequence.q.length, sequence.k.length);
      const cpu::Unit unit = {0, 0, problem.heads_k, 0, problem.group(), sequence, rule};
      const cpu::DecodePass pass = {&call.problem, &call.inputs, &call.outputs};
      const cpu::Buffer scratch = cpu::allocate(level.decode_scratch_size(pass, unit.packed_rows()));
      const auto rows = static_cast<std::size_t>(unit.packed_rows());
      const auto row_size = static_cast<std::size_t>(level.partial_row_size(call.problem));
      const auto decode = [&](cpu::ReadAhead read_ahead) {
        std::vector<float> result(rows * (row_size + 1));  // O, then lse
        const cpu::Partial partial = {result.data(), result.data() + rows * row_size};
        level.decode(pass, {&unit, visible_keys_of_unit(unit), true, partial, read_ahead}, scratch.get());
        return result;
      };
      // P may be rounded: to bfloat16, or to 15 bits of a block's largest.
      const float tolerance = problem.dtype == DType::bfloat16 ? 1e-3f : call.inputs.k.dtype == DType::int8 ? 1e-4f : 2e-5f;
      const std::vector<float> expected = decode(cpu::ReadAhead::into_l2);
      for (cpu::ReadAhead read_ahead :
           {cpu::ReadAhead::into_l2_from_memory, cpu::ReadAhead::into_l1, cpu::ReadAhead::into_l1_from_memory}) {
        const std::vector<float> got = decode(read_ahead);
        for (std::size_t j = 0; j < expected.size(); ++j) {
          ASSERT_NEAR(expected[j], got[j], tolerance) << level.name << ", " << storage.name << ", " << j;
        }
      }
    }
  }
}

TEST(Decode, ARowWhoseKeysAllLieOnMissingPagesIsZeroAndItsLseMinusInfinity) {
  for (std::int32_t seqlen_q : {1, 30}) {
    for (bool sink : {false, true}) {
      AttentionProblem problem = cached_problem(2, seqlen_q, 70, 24, 24);
      Features features;
      features.sink = sink;
      make_pages(problem, features, 16);
      for (std::int32_t block = 0; block < problem.table_blocks; ++block) {
        features.cache.block_table[static_cast<std::size_t>(block)] = block % 2 ? -1 : problem.cache_rows;
      }
      TestCall call(problem, features, 11);
      EXPECT_EQ(check_forward(call), "");
      const Result result = result_of(call);
      for (std::int32_t i = 0; i < seqlen_q * 4 * 24; ++i) ASSERT_EQ(result.out[static_cast<std::size_t>(i)], 0.0);
      for (std::int32_t i = 0; i < seqlen_q * 4; ++i) {
        const double lse = result.lse[static_cast<std::size_t>(i)];
        if (sink) {
          ASSERT_NEAR(lse, call.sink[i % 4], 1e-6);
        } else {
          ASSERT_EQ(lse, -infinity);
        }
      }
      EXPECT_TRUE(std::isfinite(result.lse.back()));
    }
  }
}

TEST(Decode, NanInAKeyReachesOnlyTheRowsThatSeeIt) {
  AttentionProblem problem = dense_problem(1, 5, 90, 8, 8);
  problem.causal = true;
  for (std::int32_t splits : {1, 4}) {
    problem.num_splits = splits;
    TestCall call(problem, {}, 12);
    const std::int64_t key = 88 * call.k.strides.seq;  // seen by queries 3 and 4
    for (int i = 0; i < 2 * 8; ++i) write_element(call.k.data, DType::float32, key + i, nan);
    const Result result = result_of(call);
    for (std::size_t row = 0; row < 5; ++row) {
      for (std::size_t i = 0; i < 4 * 8; ++i) ASSERT_EQ(std::isnan(result.out[row * 4 * 8 + i]), row >= 3) << row;
      for (std::size_t head = 0; head < 4; ++head) ASSERT_EQ(std::isnan(result.lse[row * 4 + head]), row >= 3) << row;
    }
  }
}

TEST(Decode, AMaskOfTheLowestFloatWeighsItsKeysAlike) {
  Features features;
  features.attn_mask = true;
  features.mask_dtype = DType::float32;
  AttentionProblem problem = dense_problem(1, 1, 500, 4, 4);
  for (std::int32_t splits : {1, 4}) {
    problem.num_splits = splits;
    TestCall call(problem, features, 13);
    auto* mask = static_cast<float*>(const_cast<void*>(call.attn_mask.data));
    for (int i = 0; i < 4 * 500; ++i) mask[i] = std::numeric_limits<float>::lowest();
    const ReferenceForward reference = reference_forward(call.problem, call.inputs);
    const Result result = result_of(call);
    for (std::size_t i = 0; i < result.out.size(); ++i) EXPECT_NEAR(result.out[i], reference.out.values[i], 2e-5) << splits;
  }
}

// Scores of about +-5000, whose largest lies in any of the runs.
TEST(Decode, HugeScoresStillSumToOne) {
  AttentionProblem problem = dense_problem(1, 2, 400, 16, 3);
  problem.softmax_scale = 1.0f;
  problem.num_splits = 5;
  Features features;
  features.magnitude = 40.0;
  TestCall call(problem, features, 14);
  for (int i = 0; i < 400 * 2 * 3; ++i) write_element(call.v.data, DType::float32, i, 1.0);
  for (const double out : result_of(call).out) ASSERT_NEAR(out, 1.0, 1e-5);
}

// A task takes as many kv heads as its output leaves room for; what is left over for the last one is less.
TEST(Decode, OfHeadsThatDoNotDivideIntoTasksStaysInItsMemory) {
  for (std::int32_t seqlen_q : {1, 4}) {
    AttentionProblem problem = cached_problem(1, seqlen_q, 20, 64, 576);
    problem.heads_k = 5;
    problem.heads_q = 5 * 20 / seqlen_q;
    TestCall call(problem, {}, 16);
    EXPECT_EQ(check_forward(call), "");
  }
}

// A sequence of few rows is decoded, a longer one beside it is not.
TEST(Decode, SequencesOfOneCallChooseTheirOwnPath) {
  for (std::int32_t heads_k : {1, 2, 4}) {
    AttentionProblem problem = cached_problem(4, 60, 90, 24, 40);
    problem.heads_k = heads_k;
    problem.varlen = problem.causal = true;
    Features features;
    features.cu_seqlens_q = {0, 1, 61, 61, 70};
    features.seqused_k = {90, 60, 5, 33};
    problem.total_q = 70;
    TestCall call(problem, features, 15);
    EXPECT_EQ(check_forward(call), "");
  }
}

}  // namespace
}  // namespace flash_attn::test
