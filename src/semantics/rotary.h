// Rotary position embedding (Su et al. 2021) as flash-attention's KV cache applies it.
#pragma once

#include "semantics/portable.h"

namespace flash_attn {

template <class T>
struct RotaryPair {
  T first;
  T second;
};

/// Dimensions 2t and 2t + 1 (interleaved), or t and t + rotary_dim / 2, turned by the angle of row `position` and column t.
template <class T>
FA_FN RotaryPair<T> rotate(RotaryPair<T> x, T cosine, T sine) {
  return {x.first * cosine - x.second * sine, x.first * sine + x.second * cosine};
}

/// Row of the angle table for a new key: its slot in the cache, leftpad included.
FA_FN int32 rotary_position_of_key(int32 base, int32 token) { return base + token; }

/// ... and for a query. Where a mask depends on the order of queries they are turned one by one, else all alike (upstream v2).
FA_FN int32 rotary_position_of_query(int32 base, int32 query, bool causal, int32 window_left, int32 window_right) {
  return causal || window_left >= 0 || window_right >= 0 ? base + query : base;
}

}  // namespace flash_attn
