// From q.k to a score: scale, softcap, ALiBi, attn_mask, visibility; and which probabilities dropout keeps. One element at a
// time, so that a tile may hold its rows either way. A call pays for what it uses.
#pragma once

#include "metal/sequence.metal"
#include "semantics/dropout.h"
#include "semantics/score.h"
#include "semantics/softmax.h"

namespace flash_attn {

FA_CONSTANT float minus_infinity = -numeric_limits<float>::infinity();

FA_FN float float_param(Params params, Param index) { return as_type<float>(params[index]); }

// Scores live in log2 units; with softcap, they are tanh's argument first.
struct ScoreScale {
  float query;    // what q.k is multiplied by
  float softcap;  // what tanh is multiplied by
};

FA_FN ScoreScale score_scale(Params params) {
  const float scale = float_param(params, param_softmax_scale);
#ifdef FA_SOFTCAP
  const float softcap = float_param(params, param_softcap);
  return {scale / softcap, softcap * log2_e};
#else
  return {scale * log2_e, 0.0f};
#endif
}

// All that the score of a query row needs to know of it.
struct ScoreRow {
  KeyRange keys;  // that it sees
#ifdef FA_ALIBI
  float slope_log2;
  float diagonal;  // key position on the row's diagonal
#endif
#ifdef FA_ATTN_MASK
  long mask;  // offset of its row of attn_mask
  long mask_key_stride;
  int last_key;
#endif
#ifdef FA_DROPOUT
  uint query;
  uint dropout_head;  // (batch * heads_q + head) * 32
#endif
};

/// Axes of size 1 broadcast.
FA_FN long mask_stride(Shape shape, Strides strides, int axis) {
  return shape[axis] == 1 ? 0 : strides[axis];
}

FA_FN uint dropout_head(Params params, int batch, int head) {
  return uint(batch * params[param_heads_q] + head) * 32u;
}

template <class Slopes, class MaskShape, class MaskStrides>
FA_FN ScoreRow score_row_of(
    Params params, Sequence sequence, QueryRow row, Slopes slopes, MaskShape mask_shape, MaskStrides mask_strides) {
  ScoreRow score;
  score.keys = visible_keys(sequence.rule, row.query);
#ifdef FA_ALIBI
  score.slope_log2 = slopes[sequence.batch * params[param_alibi_batch_stride] + row.head] * log2_e;
  score.diagonal = float(row.query + sequence.rule.seqlen_k - sequence.rule.seqlen_q);
#endif
#ifdef FA_ATTN_MASK
  score.mask = sequence.batch * mask_stride(mask_shape, mask_strides, 0) + row.head * mask_stride(mask_shape, mask_strides, 1) +
      row.query * mask_stride(mask_shape, mask_strides, 2);
  score.mask_key_stride = mask_stride(mask_shape, mask_strides, 3);
  score.last_key = max_of(sequence.rule.seqlen_k - 1, 0);
#endif
#ifdef FA_DROPOUT
  score.query = uint(row.query);
  score.dropout_head = dropout_head(params, sequence.batch, row.head);
#endif
  return score;
}

// A backend's words for the rules. tanh by exp2: precise::tanh costs three times as much, this is exact to 1e-7.
struct ScoreWords {
  static FA_FN float tanh(float x) {
    const float e = fast::exp2(clamp(x, -10.0f, 10.0f) * (2.0f * log2_e));
    return (e - 1.0f) / (e + 1.0f);
  }
};

FA_FN float masked(float s, bool visible) { return visible ? s : minus_infinity; }

/// -inf hides the key; anything finite leaves it visible, even where base 2 overflows (the lowest float is a common value).
template <class T>
FA_FN float masked(float s, T bias) {
  const float sum = s + float(bias) * log2_e;
  return float(bias) == minus_infinity ? minus_infinity : sum < lowest_score ? lowest_score : sum;
}

/// The score of `key`, log2 units, from q.k; -inf where attn_mask hides it. Where the row does not see the key, see `hidden`.
template <class Mask>
FA_FN float score(float dot, ScoreScale scale, ScoreRow row, int key, Mask mask) {
  float s = dot * scale.query;
#ifdef FA_SOFTCAP
  s = scale.softcap * softcap_tanh<float, ScoreWords>(s, 1.0f);
#endif
#ifdef FA_ALIBI
  s += alibi_bias<float>(row.slope_log2, row.diagonal - float(key));
#endif
#ifdef FA_ATTN_MASK
  s = masked(s, mask[row.mask + min_of(key, row.last_key) * row.mask_key_stride]);
#endif
  return s;
}

/// Causal, window, chunk and length at once. Replaces, for NaN may stand there.
FA_FN float hidden(float s, ScoreRow row, int key) {
  return row.keys.begin <= key && key < row.keys.end ? s : minus_infinity;
}

#ifdef FA_DROPOUT
// One call of Philox: 32 keys of a row from a multiple of 32 on, those of the pair (column & 6) in each run of 8.
struct DropoutCall {
  PhiloxWords<uint32> words;
  uint32 threshold;

  FA_FN bool keeps(uint row, uint column) const thread {
    const uint32 i = dropout_word_index(column);
    const uint32 word = i == 0u ? words.x : i == 1u ? words.y : i == 2u ? words.z : words.w;
    return ((word >> dropout_byte_shift(row, column)) & 255u) < threshold;
  }
};

template <class Key>
FA_FN DropoutCall dropout_call(Params params, Key key, uint head_offset, uint row, uint column) {
  const uint32 counter = dropout_counter(head_offset, row, column);
  const uint32 row_tile = row / 16u;
  const uint32 column_tile = column / 32u;
  const uint32 key_x = key[0];
  const uint32 key_y = key[1];
  return {
      philox4x32_7<uint32>({counter, 0u, row_tile, column_tile}, key_x, key_y),
      dropout_threshold(uint32(params[param_dropout_keep_24]), counter, row_tile, column_tile, key_x, key_y)};
}
#endif

/// What the probabilities that dropout keeps are multiplied by.
FA_FN float dropout_scale(Params params) {
#ifdef FA_DROPOUT
  return float_param(params, param_dropout_scale);
#else
  return 1.0f;
#endif
}

}  // namespace flash_attn
