// Where one sequence of a batch lies, whatever its lengths claim.
#pragma once

#include "semantics/portable.h"

namespace flash_attn {

struct Extent {
  int32 begin;   // first row in the packed tensor
  int32 length;  // rows in use
};

/// The slot [slot_begin, slot_end) of a packed tensor of `total` rows, cut to what exists, to `max_seqlen` and to `seqused`.
/// `floor` is where the previous slot ended: cu_seqlens that run backwards can then never make two sequences share a row.
FA_FN Extent sequence_extent(int32 slot_begin, int32 slot_end, int32 floor, int32 total, int32 max_seqlen, int32 seqused) {
  const int32 begin = clamp_to(slot_begin, floor, total);
  const int32 end = clamp_to(slot_end, begin, total);
  return {begin, clamp_to(seqused, 0, min_of(end - begin, max_seqlen))};
}

}  // namespace flash_attn
