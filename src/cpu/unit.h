// A unit of work: some kv heads of one sequence, mostly one, with all the query rows that read them.
#pragma once

#include <cstdint>

#include "semantics/mask.h"
#include "semantics/sequence.h"

namespace flash_attn::cpu {

// Where a sequence lies in q and in k, after every clamp. `begin` is 0 when dense.
// With a cache, k.begin is the slot of the first key, and `cache_row` the row of the cache or of the block table.
struct Sequence {
  Extent q;
  Extent k;
  std::int32_t cache_row;
};

// The rows of a GQA group are packed: of one kv head, packed row r is query r / group of head first_head + r % group, so that a
// block of rows shares its keys whatever the group, and a single query still fills the lanes. The next kv head's rows follow.
struct Unit {
  std::int32_t batch;
  std::int32_t kv_head;  // the first one
  std::int32_t kv_heads;
  std::int32_t first_head;
  std::int32_t group;
  Sequence sequence;
  MaskRule rule;

  std::int32_t rows_of_head() const { return sequence.q.length * group; }
  std::int32_t packed_rows() const { return rows_of_head() * kv_heads; }
};

// Keys that all rows of a unit see between them.
static inline KeyRange visible_keys_of_unit(const Unit& unit) { return visible_keys_of_rows(unit.rule, 0, unit.rule.seqlen_q); }

// Keys that the packed rows [row_begin, row_end) of a unit of one kv head see between them.
static inline KeyRange visible_keys_of_packed_rows(const Unit& unit, std::int32_t row_begin, std::int32_t row_end) {
  return visible_keys_of_rows(unit.rule, row_begin / unit.group, (row_end - 1) / unit.group + 1);
}

}  // namespace flash_attn::cpu
