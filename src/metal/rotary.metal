// Rotary embedding of queries or of new keys x [batch, tokens, heads, FA_D], or packed [tokens, heads, FA_D]: in float32, rounded
// once, to x's dtype.
//
// A thread has two head dims of a token's head: a pair that is turned, or two that are copied. A sequence's first token has the
// angles of row rotary_base of the table, a position past the table those of its last row. Grid: threads, one an item.
#pragma once

#include "metal/sequence.metal"
#include "semantics/rotary.h"

#ifndef FA_VARLEN
#define token_starts flash_attn::Absent()
#endif

namespace flash_attn {

struct Token {
  int sequence;
  int index;  // in its sequence
};

FA_FN Token token_of_row(Absent, int row, int tokens, int) { return {row / tokens, row % tokens}; }

/// Of the last sequence that starts at the row or before it. A row of nobody has some position.
template <class Starts>
FA_FN Token token_of_row(Starts starts, int row, int, int batches) {
  int sequence = 0;
  for (int i = 1; i < batches; ++i) {
    if (starts[i] <= row) sequence = i;
  }
  return {sequence, max_of(row - starts[sequence], 0)};
}

FA_FN int rotary_position(Params params, int base, int index) {
#ifdef FA_QUERIES
  return rotary_position_of_query(base, index, false, params[param_window_left], params[param_window_right]);
#else
  return rotary_position_of_key(base, index);
#endif
}

}  // namespace flash_attn

FA_BODY
using namespace flash_attn;
constexpr int pairs = (FA_D + 1) / 2;
constexpr int turned_pairs = FA_ROTARY_DIM / 2;
#ifdef FA_VARLEN
const int rows = x_shape[0];
const int heads = x_shape[1];
const int tokens = 0;
#else
const int tokens = x_shape[1];
const int rows = x_shape[0] * tokens;
const int heads = x_shape[2];
#endif
const long item = long(thread_position_in_grid.x);
if (item >= long(rows) * heads * pairs) return;
const int pair = int(item % pairs);
const int head = int(item / pairs % heads);
const int row = int(item / pairs / heads);
const Token token = token_of_row(token_starts, row, tokens, params[param_batch]);
#ifdef FA_VARLEN
const long offset = query_strides(x_strides).offset(0, row, head);
#else
const long offset = query_strides(x_strides).offset(token.sequence, token.index, head);
#endif
const device FA_T* const from = x + offset;
device FA_T* const to = rotated + (long(row) * heads + head) * FA_D;

if (pair < turned_pairs) {
#ifdef FA_INTERLEAVED
  const int first = 2 * pair;
  const int second = first + 1;
#else
  const int first = pair;
  const int second = pair + turned_pairs;
#endif
  const int base = clamp_to(rotary_base[token.sequence], 0, params[param_rotary_rows]);
  const int position = clamp_to(rotary_position(params, base, token.index), 0, params[param_rotary_rows] - 1);
  const int angle = position * turned_pairs + pair;
  const RotaryPair<float> turned =
      rotate<float>({float(from[first]), float(from[second])}, float(rotary_cos[angle]), float(rotary_sin[angle]));
  to[first] = FA_T(turned.first);
  to[second] = FA_T(turned.second);
} else {
  to[2 * pair] = from[2 * pair];
  if (2 * pair + 1 < FA_D) to[2 * pair + 1] = from[2 * pair + 1];
}
