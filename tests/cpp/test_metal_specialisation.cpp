// What is decided about Metal kernels without Metal: names, #defines, params and grids.

#include <gtest/gtest.h>

#include <bit>
#include <set>
#include <string>
#include <vector>

#include "metal/params.h"
#include "metal/specialisation.h"
#include "metal/texts.h"

namespace flash_attn::metal {
namespace {

AttentionProblem dense(int head_dim = 64, DType dtype = DType::float16) {
  AttentionProblem problem;
  problem.dtype = dtype;
  problem.batch = 2;
  problem.heads_q = 8;
  problem.heads_k = 2;
  problem.head_dim = problem.head_dim_v = head_dim;
  problem.max_seqlen_q = 100;
  problem.max_seqlen_k = 300;
  return problem;
}

Operands operands(const std::vector<std::string>& optional = {}) {
  Operands result;
  result.arrays = {{"q", "half"}, {"k", "half"}, {"v", "half"}};
  for (const std::string& name : optional) result.arrays.push_back({name, "float"});
  return result;
}

bool has_define(const Kernel& kernel, const std::string& name) {
  return kernel.defines.find("#define " + name + " ") != std::string::npos;
}

TEST(MetalSpecialisation, NumbersAreParamsAndNotText) {
  AttentionProblem longer = dense();
  longer.max_seqlen_q = 1000;
  longer.softmax_scale = 0.5f;
  longer.causal = true;
  longer.window_left = 7;
  const Kernel one = forward_kernel(dense(), operands(), {});
  const Kernel other = forward_kernel(longer, operands(), {});
  EXPECT_EQ(one.name, other.name);
  EXPECT_EQ(one.defines, other.defines);
  EXPECT_EQ(other.params[param_max_seqlen_q], 1000);
  EXPECT_EQ(std::bit_cast<float>(other.params[param_softmax_scale]), 0.5f);
  EXPECT_EQ(other.params[param_window_left], 7);
  EXPECT_EQ(other.params[param_window_right], 0) << "causal";
}

TEST(MetalSpecialisation, EveryTextHasANameOfItsOwn) {
  AttentionProblem softcap = dense();
  softcap.softcap = 3.0f;
  AttentionProblem chunk = dense();
  chunk.attention_chunk = 64;
  std::set<std::string> names;
  std::set<std::string> texts;
  for (const AttentionProblem& problem : {dense(), dense(80), dense(64, DType::float32), softcap, chunk}) {
    for (const auto& optional : {std::vector<std::string>{}, {"attn_mask"}, {"learnable_sink", "alibi_slopes"}}) {
      for (const Kernel& kernel :
           {forward_kernel(problem, operands(optional), {}), backward_dq_kernel(problem, operands(optional), {}),
            backward_dkv_kernel(problem, operands(optional), {})}) {
        names.insert(kernel.name);
        const Text text = text_of(kernel);
        texts.insert(text.functions + text.body);
      }
    }
  }
  EXPECT_EQ(names.size(), 45u);
  EXPECT_EQ(texts.size(), 45u);
}

TEST(MetalSpecialisation, ACallHasTheDefinesOfWhatItUses) {
  const Kernel plain = forward_kernel(dense(), operands(), {});
  for (const char* name : {"FA_VARLEN", "FA_SOFTCAP", "FA_ALIBI", "FA_DROPOUT", "FA_SINK", "FA_ATTN_MASK", "FA_CACHED"}) {
    EXPECT_FALSE(has_define(plain, name)) << name;
  }
  const Kernel masked = forward_kernel(dense(), operands({"attn_mask", "alibi_slopes"}), {});
  EXPECT_TRUE(has_define(masked, "FA_ATTN_MASK"));
  EXPECT_TRUE(has_define(masked, "FA_ALIBI"));
  EXPECT_NE(masked.defines.find("#define FA_MASK_T float\n"), std::string::npos);
  EXPECT_EQ(masked.inputs, (std::vector<std::string>{"params", "q", "k", "v", "attn_mask", "alibi_slopes"}));
}

TEST(MetalSpecialisation, TheGridCoversEveryRowAndKey) {
  const AttentionProblem problem = dense();
  const Kernel forward = forward_kernel(problem, operands(), {});
  EXPECT_EQ(forward.threadgroups, (std::array<int, 3>{400 / 32 + 1, 2, 2})) << "rows of four heads, in blocks of 32";
  const Kernel dkv = backward_dkv_kernel(problem, operands(), {});
  EXPECT_EQ(dkv.threadgroups, (std::array<int, 3>{300 / 32 + 1, 2, 2}));
  EXPECT_EQ(forward.threadgroup[0] % 32, 0);
}

TEST(MetalSpecialisation, EveryHeadDimHasAShape) {
  for (int dim = 1; dim <= 256; ++dim) {
    for (const DType dtype : {DType::float32, DType::float16}) {
      for (const Kernel& kernel :
           {forward_kernel(dense(dim, dtype), operands(), {}), backward_dq_kernel(dense(dim, dtype), operands(), {}),
            backward_dkv_kernel(dense(dim, dtype), operands(), {})}) {
        EXPECT_LE(kernel.threadgroup[0], 512) << dim;
      }
    }
  }
}

TEST(MetalSpecialisation, SplitsAreThoseAskedFor) {
  AttentionProblem problem = dense(128);
  problem.cached = true;
  problem.cache_rows = 2;
  problem.max_seqlen_q = 1;
  problem.max_seqlen_k = 8192;
  EXPECT_TRUE(is_decoded(problem));
  EXPECT_GT(decode_splits(problem, {}), 1) << "few rows, many keys";
  problem.num_splits = 5;
  EXPECT_EQ(decode_splits(problem, {}), 5);
  const Kernel kernel = decode_kernel(problem, operands(), 5);
  EXPECT_EQ(kernel.params[param_splits], 5);
  EXPECT_EQ(kernel.outputs, (std::vector<std::string>{"out_partial", "lse_partial"}));
  problem.num_splits = 1;
  EXPECT_EQ(decode_splits(problem, {}), 1);
  EXPECT_EQ(decode_kernel(problem, operands(), 1).outputs, (std::vector<std::string>{"out", "lse"}));
}

}  // namespace
}  // namespace flash_attn::metal
