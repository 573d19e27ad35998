// A unit of work: one kv head of one sequence, with all the query rows that read it.
#pragma once

#include <cstdint>

#include "semantics/mask.h"
#include "semantics/sequence.h"

namespace flash_attn::cpu {

// Where a sequence lies in q and in k, after every clamp. `begin` is 0 when dense.
struct Sequence {
  Extent q;
  Extent k;
};

// The rows of a GQA group are packed: packed row r is query r / group of head first_head + r % group, so that a block of rows
// shares its keys whatever the group, and a single query still fills the lanes.
struct Unit {
  std::int32_t batch;
  std::int32_t kv_head;
  std::int32_t first_head;
  std::int32_t group;
  Sequence sequence;
  MaskRule rule;

  std::int32_t packed_rows() const { return sequence.q.length * group; }
};

// Keys that the packed rows [row_begin, row_end) see between them.
static inline KeyRange visible_keys_of_packed_rows(const Unit& unit, std::int32_t row_begin, std::int32_t row_end) {
  return visible_keys_of_rows(unit.rule, row_begin / unit.group, (row_end - 1) / unit.group + 1);
}

}  // namespace flash_attn::cpu
