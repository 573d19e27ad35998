// In which order a block of keys or values is read, and what is asked for meanwhile.
#pragma once

#include "cpu/few_rows.h"
#include "cpu/kernels.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// A block of keys and where they lie. It is read as several streams side by side, each through a stretch of keys of its own: so
// no two streams share a page of memory, where the processor's prefetcher would take them for one.
struct KeySlots {
  std::int32_t begin;
  int count;
  KeySlot slots[max_decode_block + max_rows_of_step];  // those after the last key repeat it

  KeySlots() = default;
  KeySlots(const DecodePass& pass, const Unit& unit, std::int32_t first, int keys) : begin(first), count(keys) {
    int next = 0;
    for_each_stretch(*pass.problem, *pass.inputs, unit.sequence, unit.batch, {first, first + keys},
                     [&](std::int32_t, std::int32_t stretch, KeySlot slot) {
                       for (int i = 0; i < stretch; ++i, ++slot.index) slots[next++] = slot;
                     });
    for (int i = 0; i < max_rows_of_step && keys > 0; ++i) slots[next++] = slots[keys - 1];
  }
};

// Heads of the unit whose rows of a key lie side by side: all, or in caches head after head one.
inline int heads_side_by_side(const Unit& unit, const KeyTensor& source) {
  return heads_are_inner(*source.tensor) ? unit.kv_heads : 1;
}

// The rows of a step.
template <DType dtype, class Later>
struct KeyRows {
  KeyRow<dtype> row[Later::rows];

  FA_INLINE KeyRows(const auto& block, int step, int head, Along along) {
    const int steps = Later::steps(block.keys.count);
    for (int i = 0; i < Later::rows; ++i) {
      row[i] = block.row(Later::key_of(i, step, steps), head, along);
      if constexpr (Later::depth > 1) row[i].go_by(along == Along::keys ? Later::depth : 1);
    }
  }
  FA_INLINE void next() {
    for (int i = 0; i < Later::rows; ++i) row[i].next();
  }
};

// The rows of a block's keys, of one of the unit's heads. Where they are MLX's codes, the numbers of all heads are read first,
// to `numbers`: scales, then biases alike, in the order of memory: [max_decode_block][head][group] or
// [head][max_decode_block][group].
template <DType dtype>
struct BlockRows {
  static constexpr DType row_dtype = dtype;
  template <class Later>
  using StepRows = KeyRows<dtype, Later>;

  const KeyTensor& source;
  const KeySlots& keys;
  std::int32_t first_head;

  BlockRows(const DecodePass&, const Unit& unit, const KeyTensor& tensor, const KeySlots& slots, float*)
      : source(tensor), keys(slots), first_head(unit.kv_head) {}
  FA_INLINE KeyRow<dtype> row(int key, int head, Along along) const {
    return {source, keys.slots[key], first_head + head, along};
  }
};

template <DType dtype>
requires(is_affine(dtype)) struct BlockRows<dtype> {
  static constexpr DType row_dtype = dtype;
  template <class Later>
  using StepRows = KeyRows<dtype, Later>;

  const KeyTensor& source;
  const KeySlots& keys;
  std::int32_t first_head;
  bool heads_inner;  // of `numbers`
  std::int64_t numbers_of_key;
  std::int64_t numbers_of_head;
  const float* scales;
  const float* biases;

  BlockRows(const DecodePass& pass, const Unit& unit, const KeyTensor& tensor, const KeySlots& slots, float* numbers)
      : source(tensor),
        keys(slots),
        first_head(unit.kv_head),
        heads_inner(heads_side_by_side(unit, tensor) == unit.kv_heads),
        numbers_of_key(std::int64_t{heads_side_by_side(unit, tensor)} * groups_of(tensor)),
        numbers_of_head(std::int64_t{heads_inner ? 1 : max_decode_block} * groups_of(tensor)),
        scales(numbers),
        biases(numbers + std::int64_t{max_decode_block} * unit.kv_heads * groups_of(tensor)) {
    const int heads = heads_side_by_side(unit, tensor);
    for_each_stretch(*pass.problem, *pass.inputs, unit.sequence, unit.batch, {keys.begin, keys.begin + keys.count},
                     [&](std::int32_t key, std::int32_t stretch, KeySlot slot) {
                       for (int head = 0; head < unit.kv_heads; head += heads) {
                         float* first = numbers + (key - keys.begin) * numbers_of_key + head * numbers_of_head;
                         read_numbers_of_keys(source, slot, stretch, unit.kv_head + head, heads, first,
                                              first + (biases - scales));
                       }
                     });
  }
  FA_INLINE KeyRow<dtype> row(int key, int head, Along along) const {
    const std::int64_t first = min_of(key, keys.count - 1) * numbers_of_key + head * numbers_of_head;
    return {source, keys.slots[key], first_head + head, along, {scales + first, biases + first}};
  }
};

// Where the rows of a step lie. A page that does not exist is replaced by the first: for who only asks, or whose scores are
// masked later.
template <class Later>
struct RowPlaces {
  const char* of_first_head[Later::rows];
  std::int64_t head_bytes;
  std::int64_t step_bytes;

  FA_INLINE RowPlaces(const KeyTensor& source, const KeySlots& keys, int step, std::int32_t first_head)
      : head_bytes(source.tensor->strides.head * size_of(source.tensor->dtype)),
        step_bytes(source.tensor->strides.seq * size_of(source.tensor->dtype) * Later::depth) {
    const int steps = Later::steps(keys.count);
    for (int i = 0; i < Later::rows; ++i) {
      KeySlot slot = keys.slots[Later::key_of(i, step, steps)];
      slot.row = max_of(slot.row, 0);
      of_first_head[i] = element(source.tensor->data, source.tensor->dtype, slot.offset(source.tensor->strides, first_head));
    }
  }
  FA_INLINE std::int64_t bytes_to_next(Along along) const { return along == Along::keys ? step_bytes : head_bytes; }
};

// The first and the last line of each stream of a block's heads: they may lie in other pages of memory, whose addresses take
// time to find. All at once, so that this time passes once.
template <class Later, DType dtype>
FA_INLINE void ask_for_block(const KeyTensor& source, const KeySlots& keys, std::int32_t first_head, std::int32_t heads) {
  const RowPlaces<Later> first(source, keys, 0, first_head);
  const RowPlaces<Later> last(source, keys, max_of(Later::steps(keys.count) - 1, 0), first_head + heads - 1);
  Later{first.of_first_head, 0}.template ask<Later::rows>(0);
  Later{last.of_first_head, 0}.template ask<Later::rows>(row_bytes<dtype>(source.dim) - 1);
}

constexpr int keys_before_block = 4;  // of a stream, when ask_for_block comes, or a step's
constexpr int steps_at_once = 4;      // at most, where there is one head

// Whether the keys of so many steps of a block, from `step` on, follow one another in every stream.
template <class Later>
FA_INLINE bool are_side_by_side(const KeySlots& keys, int step, int count) {
  const int steps = Later::steps(keys.count);
  for (int i = 0; i < Later::rows; i += Later::depth) {
    const KeySlot first = keys.slots[Later::key_of(i, step, steps)];
    const KeySlot last = keys.slots[Later::key_of(i, step + count, steps) - 1];
    if (last.row != first.row || last.index != first.index + count * Later::depth - 1) return false;
  }
  return true;
}

// What is read after some heads of a block's keys: others, or another block.
struct NextRows {
  const KeyTensor& source;
  const KeySlots& keys;
  std::int32_t first_head;
  std::int32_t heads;  // side by side
};

// As walk(), for `heads` heads side by side from the unit's head `first_head` on.
template <class Later, class Block, class Visit>
FA_INLINE void walk_heads(const Block& block, int first_head, int heads, const NextRows& next, Visit visit) {
  constexpr DType dtype = Block::row_dtype;
  const KeyTensor& source = block.source;
  const KeySlots& keys = block.keys;
  const auto bytes = static_cast<int>(row_bytes<dtype>(source.dim));
  const int heads_ahead = max_of(1, Later::bytes_ahead / max_of(1, bytes));
  const int steps_ahead = heads_ahead / heads;
  const int heads_left = heads_ahead % heads;
  const int steps = Later::steps(keys.count);
  const int last_of_next = max_of(Later::steps(next.keys.count) - 1, 0);
  const auto places_at = [&](int step) {
    if (step < steps) return RowPlaces<Later>(source, keys, step, block.first_head + first_head);
    return RowPlaces<Later>(next.source, next.keys, min_of(step - steps, last_of_next), next.first_head);
  };
  RowPlaces<Later> next_ahead = places_at(steps_ahead);
  int steps_now = 1;
  for (int step = 0; step < steps; step += steps_now) {
    const int at_once = heads == 1 ? min_of(steps_at_once, steps - step) : 1;
    steps_now = at_once > 1 && are_side_by_side<Later>(keys, step, at_once) ? at_once : 1;
    const Along along = steps_now == 1 ? Along::heads : Along::keys;
    const int ask_at = steps - max_of(keys_before_block / Later::depth, 1);
    if (step <= ask_at && ask_at < step + steps_now) {
      ask_for_block<Later, dtype>(next.source, next.keys, next.first_head, next.heads);
    }
    const RowPlaces<Later> ahead = next_ahead;
    next_ahead = places_at(step + steps_ahead + steps_now);
    typename Block::template StepRows<Later> rows(block, step, first_head, along);
    const int count = heads * steps_now;
    for (int row = 0; row < count; ++row) {
      const bool is_step = along == Along::keys;
      const bool is_ahead = is_step || row + heads_left < heads;
      const RowPlaces<Later>& place = is_ahead ? ahead : next_ahead;
      const std::int64_t offset = (row + heads_left - (is_ahead ? 0 : heads)) * place.bytes_to_next(along);
      visit(is_step ? step + row : step, is_step ? first_head : first_head + row, rows, Later{place.of_first_head, offset});
      if (row + 1 < count) rows.next();
    }
  }
}

// visit(step, head, rows, later) for all rows of a block in the order of memory: the heads of one step after the other, or, in
// caches head after head, the steps of one head. `later` is what the visitor asks for while it reads `rows`, a line for every
// line: the same streams, Later::bytes_ahead on, then the first steps of `next`. At this steady rate memory works while the
// arithmetic does; in bursts, or without, it waits (docs/performance.md). Where there is one head, the next steps take the
// place of the next heads: so several rows share the finding of the first.
template <class Later, class Block, class Visit>
FA_INLINE void walk(const Unit& unit, const Block& block, const KeyTensor& next_source, const KeySlots& next_keys,
                    Visit visit) {
  const int heads = heads_side_by_side(unit, block.source);
  const NextRows next_block = {next_source, next_keys, unit.kv_head, heads_side_by_side(unit, next_source)};
  for (int head = 0; head < unit.kv_heads; head += heads) {
    const NextRows next_heads = {block.source, block.keys, unit.kv_head + head + heads, heads};
    walk_heads<Later>(block, head, heads, head + heads < unit.kv_heads ? next_heads : next_block, visit);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
