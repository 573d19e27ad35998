// P and dS of eight rows and eight keys.
#pragma once

#include "metal/scores.metal"
#include "metal/tile.metal"

namespace flash_attn {

FA_CONSTANT float infinity = numeric_limits<float>::infinity();

// A query row in the lanes that have it.
struct GradientRow {
  ScoreRow score;
  float lse_log2;
  float delta;  // D
};

FA_FN GradientRow gradient_row(ScoreRow score, float lse_log2, float delta) {
  if (lse_log2 == infinity) score.keys = {0, 0};
  return {score, lse_log2, delta};
}

/// Infinity, which makes every probability 0, where a row sees no key: by its range, or by what attn_mask left of that. What
/// such a row holds counts as 0, for NaN may stand there.
FA_FN float lse_log2(float lse, KeyRange keys) {
  return keys.begin < keys.end && lse != minus_infinity ? lse * log2_e : infinity;
}

// ---- what dropout multiplies a probability by: 0 or a factor

#ifdef FA_DROPOUT
// Of one row, in a run of 32 keys: those of one pair in each run of 8.
struct Dropout {
  uint kept;  // a bit each, in their order
  float scale;

  FA_FN float factor(int key) const thread { return (kept >> uint(key % 32 / 8 * 2 + key % 2)) % 2u == 1u ? scale : 0.0f; }
};

/// Of the pair of `key`, which is even.
template <class Key>
FA_FN uint kept_keys(Params params, uint head, uint query, int key, Key philox_key) {
  const DropoutCall call = dropout_call(params, philox_key, head, query, uint(key));
  uint kept = 0u;
  FA_UNROLL
  for (short i = 0; i < 8; ++i) {
    if (call.keeps(query, uint(key % 8 + i / 2 * 8 + i % 2))) kept |= 1u << uint(i);
  }
  return kept;
}

template <class Key>
FA_FN Dropout dropout_of(Params params, ScoreRow row, int key, Key philox_key) {
  return {kept_keys(params, row.dropout_head, row.query, key, philox_key), dropout_scale(params)};
}
#else
struct KeepsAll {
  FA_FN float factor(int) const thread { return 1.0f; }
};

FA_FN KeepsAll dropout_of(Params, ScoreRow, int, Absent) { return {}; }
#endif

// ---- gradients

struct ScoreGradient {
  Fragment<float> p;   // dropout(P)
  Fragment<float> ds;  // of the score after softcap
};

/// From q.k and dP = dO V^T of the keys `key` and `key` + 1; unless `every` row of the fragment sees every key, they are masked.
template <class Dropout, class Mask>
FA_FN ScoreGradient score_gradient(
    Fragment<float> dot, Fragment<float> dp, GradientRow row, int key, bool every, ScoreScale scale, Dropout dropout, Mask mask) {
  ScoreGradient gradient;
  FA_UNROLL
  for (short i = 0; i < 2; ++i) {
    float s = score(dot[i], scale, row.score, key + i, mask);
    if (!every) s = hidden(s, row.score, key + i);
    const float p = fast::exp2(s - row.lse_log2);
    const float kept = dropout.factor(key + i);
    gradient.p[i] = p * kept;
    // Where P is 0 the key is masked, and so is whatever its V holds.
    gradient.ds[i] = p == 0.0f ? 0.0f : p * ((kept == 0.0f ? 0.0f : dp[i] * kept) - row.delta);
  }
  return gradient;
}

/// dS of q.k, but for the scale.
FA_FN Fragment<float> dot_gradient(Fragment<float> ds, Fragment<float> dot, ScoreScale scale) {
#ifdef FA_SOFTCAP
  FA_UNROLL
  for (short i = 0; i < 2; ++i) {
    const float derivative = softcap_derivative(softcap_tanh<float, ScoreWords>(dot[i] * scale.query, 1.0f));
    ds[i] = ds[i] == 0.0f ? 0.0f : ds[i] * derivative;
  }
#endif
  return ds;
}

// ---- FA_SPLIT_D simdgroups share tiles: each has a part of q.k and dP, lane by lane

FA_CONSTANT int part_size = 4 * 32;  // of one tile and simdgroup

/// Parts to sums, the same in all simdgroups that share them. Every simdgroup calls it; between two calls lies a barrier.
template <int tiles>
FA_FN void add_parts(
    thread Tile<tiles>& dot, thread Tile<tiles>& dp, threadgroup float* parts, uint simdgroup, uint lane) {
#if FA_SPLIT_D > 1
  FA_UNROLL
  for (short t = 0; t < tiles; ++t) {
    threadgroup float* const mine = parts + (int(simdgroup) * tiles + t) * part_size + int(lane) * 4;
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      mine[i] = dot.fragment[t][i];
      mine[2 + i] = dp.fragment[t][i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  dot.fill(0.0f);
  dp.fill(0.0f);
  const int first = int(simdgroup) / FA_SPLIT_D * FA_SPLIT_D;
  FA_UNROLL
  for (short t = 0; t < tiles; ++t) {
    FA_UNROLL
    for (short part = 0; part < FA_SPLIT_D; ++part) {
      const threadgroup float* const theirs = parts + ((first + part) * tiles + t) * part_size + int(lane) * 4;
      FA_UNROLL
      for (short i = 0; i < 2; ++i) {
        dot.fragment[t][i] += theirs[i];
        dp.fragment[t][i] += theirs[2 + i];
      }
    }
  }
#endif
}

}  // namespace flash_attn
