// Scales and biases of MLX's codes in the order in which products use them.
#pragma once

#include "cpu/key_walk.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// to[group * of_group + i] = from[i * groups + group]
inline void split_groups(const float* from, std::int64_t count, int groups, float* to, std::int64_t of_group) {
  if (groups == 1) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  std::int64_t i = 0;
  if (groups == 2) {
    for (; i + lanes <= count; i += lanes) {
      const Vec pairs[2] = {load(from + 2 * i), load(from + 2 * i + lanes)};
      store(to + i, even_lanes(pairs[0], pairs[1]));
      store(to + of_group + i, odd_lanes(pairs[0], pairs[1]));
    }
  }
  for (; i < count; ++i) {
    for (int group = 0; group < groups; ++group) to[group * of_group + i] = from[i * groups + group];
  }
}

// Of a block's keys, [head of the unit][group][stride]: what a tile of K's codes reads. `numbers` are block.scales or biases.
// Those after the last key are its own, or what was there: nobody reads the scores that they make.
template <DType dtype>
inline void order_key_numbers(const BlockRows<dtype>& block, int heads, const float* numbers, std::int64_t stride,
                              float* ordered) {
  const int groups = groups_of(block.source);
  const int keys = block.keys.count;
  if (!block.heads_inner) {
    for (int head = 0; head < heads; ++head) {
      split_groups(numbers + head * block.numbers_of_head, keys, groups, ordered + head * groups * stride, stride);
    }
    return;
  }
  for (int key = 0; key < keys; key += lanes) {
    const float* of_key[lanes];
    for (int lane = 0; lane < lanes; ++lane) of_key[lane] = numbers + min_of(key + lane, keys - 1) * block.numbers_of_key;
    visit_columns(of_key, heads * groups, [&](int i, Vec of_keys) { store(ordered + i * stride + key, of_keys); });
  }
}

// [group][key][head of the unit] and `lanes` more a group: what passes over rows of P reads.
template <DType dtype>
inline void order_value_numbers(const BlockRows<dtype>& block, int heads, const float* numbers, std::int64_t of_group,
                                float* ordered) {
  const int groups = groups_of(block.source);
  const int keys = block.keys.count;
  if (block.heads_inner) return split_groups(numbers, keys * heads, groups, ordered, of_group);
  // From the last heads to the first, whose vectors take the place of what others leave in the next key's.
  for (int head = (heads - 1) / lanes * lanes; head >= 0; head -= lanes) {
    const float* of_head[lanes];
    for (int lane = 0; lane < lanes; ++lane) of_head[lane] = numbers + min_of(head + lane, heads - 1) * block.numbers_of_head;
    float* to = ordered + head;
    int group = 0;
    visit_columns(of_head, keys * groups, [&](int, Vec of_heads) {
      store(to + group * of_group, of_heads);
      if (++group < groups) return;
      group = 0;
      to += heads;
    });
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
