// In which order a block of keys or values is read, and what is asked for meanwhile.
#pragma once

#include "cpu/few_rows.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// A block of keys and where they lie. It is read as several streams side by side, each through a stretch of keys of its own, a
// key a step: so no two streams share a page of memory, where the processor's prefetcher would take them for one.
struct KeySlots {
  std::int32_t begin;
  int count;
  KeySlot slots[max_decode_block + max_streams];  // those after the last key repeat it

  KeySlots() = default;
  KeySlots(const DecodePass& pass, const Unit& unit, std::int32_t first, int keys) : begin(first), count(keys) {
    int next = 0;
    for_each_stretch(*pass.problem, *pass.inputs, unit.sequence, unit.batch, {first, first + keys},
                     [&](std::int32_t, std::int32_t stretch, KeySlot slot) {
                       for (int i = 0; i < stretch; ++i, ++slot.index) slots[next++] = slot;
                     });
    for (int i = 0; i < max_streams && keys > 0; ++i) slots[next++] = slots[keys - 1];
  }

  int steps(int streams) const { return (count + streams - 1) / streams; }
};

// The rows of a block's keys, of the unit's first head. Where they are MLX's codes, the numbers of all heads are read first, to
// `numbers`: scales[max_decode_block][head][group], then biases alike.
template <DType dtype>
struct BlockRows {
  const KeyTensor& source;
  const KeySlots& keys;
  std::int32_t first_head;

  BlockRows(const DecodePass&, const Unit& unit, const KeyTensor& tensor, const KeySlots& slots, float*)
      : source(tensor), keys(slots), first_head(unit.kv_head) {}
  FA_INLINE KeyRow<dtype> row(int key, Along along) const { return {source, keys.slots[key], first_head, along}; }
};

template <DType dtype>
requires(is_affine(dtype)) struct BlockRows<dtype> {
  const KeyTensor& source;
  const KeySlots& keys;
  std::int32_t first_head;
  std::int64_t numbers_of_key;
  const float* scales;
  const float* biases;

  BlockRows(const DecodePass& pass, const Unit& unit, const KeyTensor& tensor, const KeySlots& slots, float* numbers)
      : source(tensor),
        keys(slots),
        first_head(unit.kv_head),
        numbers_of_key(std::int64_t{unit.kv_heads} * (tensor.dim / quantization_group)),
        scales(numbers),
        biases(numbers + max_decode_block * numbers_of_key) {
    for_each_stretch(*pass.problem, *pass.inputs, unit.sequence, unit.batch, {keys.begin, keys.begin + keys.count},
                     [&](std::int32_t key, std::int32_t stretch, KeySlot slot) {
                       float* first = numbers + (key - keys.begin) * numbers_of_key;
                       read_numbers_of_keys(source, slot, stretch, unit.kv_head, unit.kv_heads, first,
                                            first + max_decode_block * numbers_of_key);
                     });
  }
  FA_INLINE KeyRow<dtype> row(int key, Along along) const {
    const std::int64_t first = min_of(key, keys.count - 1) * numbers_of_key;
    return {source, keys.slots[key], first_head, along, {scales + first, biases + first}};
  }
};

// Where the rows of one step lie. What is only asked for may be a page that does not exist: any other place will do.
template <int streams>
struct StreamRows {
  const char* of_first_head[streams];
  std::int64_t head_bytes;
  std::int64_t key_bytes;

  FA_INLINE StreamRows(const KeyTensor& source, const KeySlots& keys, int step, std::int32_t first_head)
      : head_bytes(source.tensor->strides.head * size_of(source.tensor->dtype)),
        key_bytes(source.tensor->strides.seq * size_of(source.tensor->dtype)) {
    const int steps = keys.steps(streams);
    for (int i = 0; i < streams; ++i) {
      KeySlot slot = keys.slots[i * steps + step];
      slot.row = max_of(slot.row, 0);
      of_first_head[i] = element(source.tensor->data, source.tensor->dtype, slot.offset(source.tensor->strides, first_head));
    }
  }
};

// The first and the last line of each stream of a block: they may lie in other pages of memory, whose addresses take time to
// find. All at once, so that this time passes once.
template <class Later, DType dtype>
FA_INLINE void ask_for_block(const Unit& unit, const KeyTensor& source, const KeySlots& keys) {
  constexpr int streams = Later::streams;
  const StreamRows<streams> first(source, keys, 0, unit.kv_head);
  const StreamRows<streams> last(source, keys, max_of(keys.steps(streams) - 1, 0), unit.kv_head + unit.kv_heads - 1);
  Later{first.of_first_head}.template ask<streams>(0);
  Later{last.of_first_head}.template ask<streams>(row_bytes<dtype>(source.dim) - 1);
}

constexpr int steps_before_block = 4;  // when ask_for_block comes
constexpr int keys_of_step = 4;        // at most, where there is one head

// Whether the keys of so many steps from `step` on follow one another in every stream.
template <int streams>
FA_INLINE bool are_side_by_side(const KeySlots& keys, int step, int count) {
  const int steps = keys.steps(streams);
  if (step + count > steps) return false;
  for (int i = 0; i < streams; ++i) {
    const KeySlot first = keys.slots[i * steps + step];
    const KeySlot last = keys.slots[i * steps + step + count - 1];
    if (last.row != first.row || last.index != first.index + count - 1) return false;
  }
  return true;
}

// visit(step, head, rows, later) for all rows of a block, the heads of one step after the other. `later` is what the visitor
// asks for while it reads `rows`, a line for every line: the same streams, Later::bytes_ahead on, then the first steps
// of `next`. At this steady rate memory works while the arithmetic does; in bursts, or without, it waits (docs/performance.md).
// Where there is one head, as in caches head after head, the next keys take the place of the next heads: so several rows
// share the finding of the first.
template <class Later, DType dtype, class Visit>
FA_INLINE void walk(const Unit& unit, const BlockRows<dtype>& block, const KeyTensor& next_source, const KeySlots& next_keys,
                    Visit visit) {
  constexpr int streams = Later::streams;
  const KeyTensor& source = block.source;
  const KeySlots& keys = block.keys;
  const auto bytes = static_cast<int>(row_bytes<dtype>(source.dim));
  const int heads_ahead = max_of(1, Later::bytes_ahead / max_of(1, bytes));
  const int steps_ahead = heads_ahead / unit.kv_heads;
  const int heads_left = heads_ahead % unit.kv_heads;
  const int steps = keys.steps(streams);
  const int last_of_next = max_of(next_keys.steps(streams) - 1, 0);
  const auto rows_at = [&](int step) {
    if (step < steps) return StreamRows<streams>(source, keys, step, unit.kv_head);
    return StreamRows<streams>(next_source, next_keys, min_of(step - steps, last_of_next), unit.kv_head);
  };
  StreamRows<streams> next_ahead = rows_at(steps_ahead);
  int keys_now = 1;
  for (int step = 0; step < steps; step += keys_now) {
    keys_now = unit.kv_heads == 1 && are_side_by_side<streams>(keys, step, keys_of_step) ? keys_of_step : 1;
    const Along along = keys_now == 1 ? Along::heads : Along::keys;
    const int ask_at = steps - steps_before_block;
    if (step <= ask_at && ask_at < step + keys_now) ask_for_block<Later, dtype>(unit, next_source, next_keys);
    const StreamRows<streams> ahead = next_ahead;
    next_ahead = rows_at(step + steps_ahead + keys_now);
    KeyRow<dtype> rows[streams];
    for (int i = 0; i < streams; ++i) rows[i] = block.row(i * steps + step, along);
    const int count = unit.kv_heads * keys_now;
    for (int row = 0; row < count; ++row) {
      const bool is_key = along == Along::keys;
      const bool is_ahead = is_key || row + heads_left < unit.kv_heads;
      const StreamRows<streams>& place = is_ahead ? ahead : next_ahead;
      const std::int64_t offset =
          (row + heads_left - (is_ahead ? 0 : unit.kv_heads)) * (is_key ? place.key_bytes : place.head_bytes);
      const char* later[streams];
      for (int i = 0; i < streams; ++i) later[i] = place.of_first_head[i] + offset;
      visit(is_key ? step + row : step, is_key ? 0 : row, rows, Later{later});
      if (row + 1 < count) {
        for (int i = 0; i < streams; ++i) rows[i].next();
      }
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
