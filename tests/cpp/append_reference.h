// What appending to a cache and rotating queries are: in double, one element after another.
#pragma once

#include <vector>

#include "scalar_reference.h"

namespace flash_attn::test {

/// A head's row of a new key or value, as it should lie in the cache but for the cache's own rounding.
struct AppendedRow {
  KeyPlace place;
  std::int32_t head;
  bool is_value;  // else a key, rotated and rounded to the problem's dtype
  std::vector<double> elements;
};

/// Those that are not dropped, in the order of writing: of rows at one place, the last one stays.
std::vector<AppendedRow> reference_append(const AttentionProblem& problem, const cpu::AttentionInputs& inputs,
                                          const cpu::NewKeys& new_keys, const cpu::RotaryTable& rotary);

/// [query rows, heads_q, head_dim], NaN in rows that belong to no sequence.
std::vector<double> reference_rotated_queries(const AttentionProblem& problem, const cpu::AttentionInputs& inputs,
                                              const cpu::RotaryTable& rotary);

}  // namespace flash_attn::test
