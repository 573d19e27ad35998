// Where a paged cache keeps a slot: entry slot / page_size of the sequence's row of the block table names the page.
#pragma once

#include "semantics/portable.h"

namespace flash_attn {

struct PageSlot {
  int32 entry;  // of the sequence's row of the block table
  int32 row;    // inside the page
};

FA_FN PageSlot page_slot(int32 slot, int32 page_size) { return {slot / page_size, slot % page_size}; }

/// Entries outside the cache (-1 by convention) name no page: its slots keep their positions, its keys are invisible, what is
/// appended to it is dropped.
FA_FN bool page_exists(int32 page, int32 pages) { return 0 <= page && page < pages; }

}  // namespace flash_attn
