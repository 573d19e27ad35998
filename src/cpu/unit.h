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

// The rows of a GQA group are packed: packed row r is query r / group of head kv_head * group + r % group, so that a block of
// rows shares its keys whatever the group, and a single query still fills the lanes.
struct Unit {
  std::int32_t batch;
  std::int32_t kv_head;
  Sequence sequence;
  MaskRule rule;
  std::int32_t packed_rows;  // sequence.q.length * group
};

}  // namespace flash_attn::cpu
