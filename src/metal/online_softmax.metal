// The online softmax of the rows of a tile (FlashAttention-2, algorithm 1), and what becomes of a row at its end.
#pragma once

#include "metal/scores.metal"
#include "metal/tile.metal"

namespace flash_attn {

// Of this lane's row, log2 units. The lanes of a row keep parts of l, which are added up once, at the end.
struct SoftmaxRow {
  float m;
  float l;
};

#ifdef FA_SINK
/// A sink is a key that was seen before all others, whose value is 0.
template <class Sinks>
FA_FN SoftmaxRow start_softmax(Sinks sinks, int head, uint lane) {
  const float sink = sinks[head] * log2_e;
  return {max(sink, lowest_score), sink > lowest_score && is_first_of_row(lane) ? 1.0f : 0.0f};
}
#else
FA_FN SoftmaxRow start_softmax(Absent, int, uint) { return {lowest_score, 0.0f}; }
#endif

/// S to P; m and l go on. Returns alpha, by which O is still to be multiplied.
template <int columns>
FA_FN float online_softmax(thread Tile<columns>& s, thread SoftmaxRow& row) {
  float highest = minus_infinity;
  FA_UNROLL
  for (short j = 0; j < columns; ++j) highest = max(highest, max(s.fragment[j].x, s.fragment[j].y));
  const float m = max(row.m, row_max(highest));
  const float alpha = fast::exp2(row.m - m);
  float sum = 0.0f;
  FA_UNROLL
  for (short j = 0; j < columns; ++j) {
    s.fragment[j] = Fragment<float>(fast::exp2(s.fragment[j].x - m), fast::exp2(s.fragment[j].y - m));
    sum += s.fragment[j].x + s.fragment[j].y;
  }
  row = {m, row.l * alpha + sum};
  return alpha;
}

// What is left to do to a row of O, and its lse. A row that saw nothing gives 0 and -inf.
struct RowEnd {
  float scale;
  float lse;
};

FA_FN RowEnd end_of_row(SoftmaxRow row, float scale) {
  const float l = row_sum(row.l);
  if (l == 0.0f) return {0.0f, minus_infinity};
  return {scale / l, (row.m + log2(l)) * ln_2};
}

}  // namespace flash_attn
