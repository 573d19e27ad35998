// One named case a feature, from which the tests make their tables.
#pragma once

#include <optional>
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

/// Of a cached problem: where its keys lie, whatever they are stored as.
const std::vector<Case>& cache_cases();
/// The same with new keys to append, and rotation.
const std::vector<Case>& append_cases();

/// What a cache is stored as.
struct Storage {
  const char* name;
  DType dtype;                            // of the problem
  std::optional<DType> k_codes, v_codes;  // none: the problem's dtype
  DType scale_dtype;

  void apply(AttentionProblem& problem, Features& features) const;
  /// Head dims of a call that is stored so: whole groups where codes have them.
  std::int32_t head_dim(std::int32_t wanted) const;
};

void PrintTo(const Storage& storage, std::ostream* stream);

const std::vector<Storage>& storages();

const char* name_of(DType dtype);

/// 4 query heads over 2 kv heads.
AttentionProblem dense_problem(std::int32_t batch, std::int32_t seqlen_q, std::int32_t seqlen_k, std::int32_t head_dim,
                               std::int32_t head_dim_v);

/// As dense_problem, with keys in a cache that has a row of `capacity` slots for each sequence.
AttentionProblem cached_problem(std::int32_t batch, std::int32_t seqlen_q, std::int32_t capacity, std::int32_t head_dim,
                                std::int32_t head_dim_v);

/// Moves the cache of a cached problem into pages, the last page first.
void make_pages(AttentionProblem& problem, Features& features, std::int32_t page_size);

}  // namespace flash_attn::test
