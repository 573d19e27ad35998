// Which keys a query sees.
//
// Causal, sliding window, chunk and sequence length each keep one interval of keys, so their intersection is one interval
// whose two ends never move left as the row grows. Every backend derives all it needs from that: the key blocks a row block
// must load, whether a tile needs masking, and the mask itself.
#pragma once

#include "semantics/portable.h"

namespace flash_attn {

struct MaskRule {
  int32 seqlen_q;
  int32 seqlen_k;
  int32 window_left;      // keys before the diagonal that stay visible; negative: all of them
  int32 window_right;     // keys after the diagonal that stay visible; negative: all of them. Causal means 0
  int32 attention_chunk;  // a query sees its own chunk of so many keys; 0: no chunks
};

struct KeyRange {
  int32 begin;
  int32 end;  // past the last; begin >= end: empty
};

/// Causal is a window whose right side is 0, whatever the caller gave for it (upstream v2).
FA_FN int32 causal_window_right(bool causal, int32 window_right) { return causal ? 0 : window_right; }

/// Keys that query `row` of its sequence sees: positions in [0, seqlen_k), aligned so that the last query meets the last key.
FA_FN KeyRange visible_keys(MaskRule rule, int32 row) {
  const int32 diagonal = row - rule.seqlen_q + rule.seqlen_k;  // in this order it cannot overflow
  KeyRange keys = {0, rule.seqlen_k};
  // Compared before they are added, so that windows near 2^31 cannot overflow.
  if (rule.window_left >= 0 && rule.window_left < diagonal) keys.begin = diagonal - rule.window_left;
  if (rule.window_right >= 0 && rule.window_right < rule.seqlen_q - 1 - row) keys.end = diagonal + rule.window_right + 1;
  if (rule.attention_chunk > 0) {
    if (diagonal < 0) return {0, 0};
    const int32 chunk_begin = diagonal / rule.attention_chunk * rule.attention_chunk;
    keys.begin = max_of(keys.begin, chunk_begin);
    if (rule.attention_chunk < keys.end - chunk_begin) keys.end = chunk_begin + rule.attention_chunk;
  }
  keys.begin = clamp_to(keys.begin, 0, rule.seqlen_k);
  keys.end = clamp_to(keys.end, 0, rule.seqlen_k);
  return keys;
}

/// Keys that at least one query in [row_begin, row_end) sees, and perhaps keys between them that none sees.
FA_FN KeyRange visible_keys_of_rows(MaskRule rule, int32 row_begin, int32 row_end) {
  if (row_begin >= row_end) return {0, 0};
  return {visible_keys(rule, row_begin).begin, visible_keys(rule, row_end - 1).end};
}

/// True when every query in [row_begin, row_end) sees every key of `keys`: the tile needs no mask.
FA_FN bool all_visible(MaskRule rule, int32 row_begin, int32 row_end, KeyRange keys) {
  return visible_keys(rule, row_end - 1).begin <= keys.begin && keys.end <= visible_keys(rule, row_begin).end;
}

}  // namespace flash_attn
