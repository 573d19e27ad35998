// Where k and v hold the key at a position of a sequence: packed, dense, in a cache or in the pages of one.
#pragma once

#include "cpu/attention.h"
#include "cpu/unit.h"
#include "semantics/paging.h"

namespace flash_attn::cpu {

// Along the first two axes of k and v.
struct KeySlot {
  std::int32_t row;  // batch item, cache row or page; negative: the page does not exist
  std::int32_t index;

  bool exists() const { return row >= 0; }
  std::int64_t offset(const Strides& strides, std::int32_t head) const {
    return row * strides.batch + index * strides.seq + head * strides.head;
  }
};

// `slot` counts from the start of the sequence's row of the cache.
static inline KeySlot cache_slot(const AttentionProblem& problem, const KeyCache& cache, std::int32_t cache_row,
                                 std::int32_t slot) {
  if (problem.page_size == 0) return {cache_row, slot};
  const PageSlot place = page_slot(slot, problem.page_size);
  const std::int32_t page = cache.block_table[std::int64_t{cache_row} * problem.table_blocks + place.entry];
  return {page_exists(page, problem.cache_rows) ? page : -1, place.row};
}

static inline KeySlot slot_of_key(const AttentionProblem& problem, const AttentionInputs& inputs, const Sequence& sequence,
                                  std::int32_t batch, std::int32_t key) {
  const std::int32_t slot = sequence.k.begin + key;
  if (!problem.cached) return {batch, slot};
  return cache_slot(problem, inputs.cache, sequence.cache_row, slot);
}

// visit(first key, keys, slot of the first) for every stretch of `keys` whose slots follow one another.
template <class Visit>
static inline void for_each_stretch(const AttentionProblem& problem, const AttentionInputs& inputs, const Sequence& sequence,
                                    std::int32_t batch, KeyRange keys, Visit visit) {
  if (keys.begin >= keys.end) return;
  if (problem.page_size == 0) {
    visit(keys.begin, keys.end - keys.begin, slot_of_key(problem, inputs, sequence, batch, keys.begin));
    return;
  }
  PageSlot place = page_slot(sequence.k.begin + keys.begin, problem.page_size);
  const std::int32_t* pages = inputs.cache.block_table + std::int64_t{sequence.cache_row} * problem.table_blocks;
  for (std::int32_t key = keys.begin; key < keys.end; ++place.entry) {
    const std::int32_t page = pages[place.entry];
    const std::int32_t count = min_of(problem.page_size - place.row, keys.end - key);
    visit(key, count, KeySlot{page_exists(page, problem.cache_rows) ? page : -1, place.row});
    key += count;
    place.row = 0;
  }
}

}  // namespace flash_attn::cpu
