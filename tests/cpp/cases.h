// One named case a feature, from which the tests make their tables.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "test_call.h"

namespace flash_attn::test {

struct Case {
  const char* name;
  void (*apply)(AttentionProblem& problem, Features& features);  // to a dense problem with at least 2 batch items and 4 heads
};

void PrintTo(const Case& test_case, std::ostream* stream);

const std::vector<Case>& feature_cases();

const char* name_of(DType dtype);

/// 4 query heads over 2 kv heads.
AttentionProblem dense_problem(std::int32_t batch, std::int32_t seqlen_q, std::int32_t seqlen_k, std::int32_t head_dim,
                               std::int32_t head_dim_v);

}  // namespace flash_attn::test
