// S of a panel of rows and a block of keys, and P.
//
//   for a few keys at a time:  S = K Q^T of these keys  |  P = 2^(S - m) of the keys before them
//
// Side by side, since the one keeps the multipliers busy and the other mostly what lies beside them. Of keys that a row does
// not see, and where steps on scores want many at a time, S comes first.
#pragma once

#include "cpu/forward_products.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Of P of a tile of M keys: beyond it one is more than 2^most_above_m, so that m rises when the tile is taken anew.
template <int M>
constexpr float largest_sum = M * 512.0f;

// P of M keys by N vectors of rows from their scores, which lie side by side, over `scale`. In place, a key a step.
template <int M, int N>
class TileSoftmax {
 public:
  static_assert(most_above_m == 8.0f && largest_sum<M> > M * 256.0f);

  // Null: no scores.
  TileSoftmax(float* scores, const float* scale, const SoftmaxState& state)
      : scores_(scores), next_(scores), end_(scores ? scores + M * N * lanes : scores), scale_(scale), m_(state.m) {}

  // `scale` and m are read again each time: a product leaves no registers for them.
  FA_INLINE void step() {
    if (next_ == end_) return;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* s = next_ + n * lanes;
      store(s, exp2_of(load(s) * splat(*scale_) - load(m_ + n * lanes)));
    }
    next_ += N * lanes;
  }

  // Takes the steps that are left, and adds P to l. False where a score is far above m: then nothing is added, and P of no use.
  FA_INLINE bool finish(SoftmaxState& state) {
    if (!scores_) return true;
    while (next_ != end_) step();
    Vec sum[N];
    IVec fits = splat(-1);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sum[n] = load(scores_ + n * lanes);
#pragma GCC unroll 8
      for (int m = 1; m < M; ++m) sum[n] += load(scores_ + (m * N + n) * lanes);
      fits &= sum[n] < largest_sum<M>;
    }
    if (any_of(~fits)) return false;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(state.l + n * lanes, load(state.l + n * lanes) + sum[n]);
    return true;
  }

 private:
  float* scores_;
  float* next_;
  float* end_;
  const float* scale_;
  const float* m_;
};

// The scores of a tile, and P of the one before. Out of line, so that its loop has all registers; `before` by reference, since
// a copy of what was just written waits for it.
template <class Operand, int M, int N>
__attribute__((noinline)) bool score_tile_beside(const float* k, int dim_words, const float* q_transposed, float scale,
                                                 float* scores, TileSoftmax<M, N>& before, SoftmaxState& state,
                                                 PackAhead<Operand>& ahead) {
  struct {
    TileSoftmax<M, N>& softmax;
    PackAhead<Operand>& ahead;
    FA_INLINE void step() {
      ahead.step();
      softmax.step();
    }
  } beside = {before, ahead};
  score_tile<Operand, M, N>(k, dim_words, q_transposed, N * lanes, scale, scores, N * lanes, beside);
  return before.finish(state);
}

// What a block of keys is added to: O of a panel, null before the first block.
struct SummedRows {
  float* o;
  int row_size;
  int dims;  // of a row that are in use, in whole vectors
};

template <class Operand, int N>
class BlockScores {
 public:
  // `tile` begins with the key of k's first row and is of N vectors of rows side by side; what `staircase` knows is counted
  // from there, too.
  BlockScores(const ScoreSteps& steps, const ScoreContext& context, const RowPanel& panel, const Staircase& staircase,
              const ScoreTile& tile, SoftmaxState& state, SummedRows rows, float*)
      : steps_(steps), context_(context), panel_(panel), staircase_(staircase), tile_(tile), state_(state), rows_(rows) {}

  // P after dropout, in place of S, of K [keys][dim words] and Q^T [dim words][N vectors].
  const ScoreTile& compute(const float* k, int dim_words, const float* q_transposed, PackAhead<Operand>& ahead) {
    k_ = k;
    dim_words_ = dim_words;
    q_transposed_ = q_transposed;
    const KeyRange plain = plain_keys();
    score_first({0, plain.begin}, ahead);
    if constexpr (Products::softmax_beside) score_beside(plain, ahead);
    score_first({plain.end, tile_.keys}, ahead);
    if (context_.problem->has_dropout) drop_probabilities(*context_.problem, *context_.inputs, panel_, tile_);
    return tile_;
  }

 private:
  using Products = ForwardProducts<Operand>;
  static constexpr int M = score_keys<N>;

  ScoreTile tile_of(KeyRange keys) const {
    return {tile_.scores + keys.begin * tile_.stride, tile_.stride, keys.end - keys.begin, tile_.key_begin + keys.begin};
  }

  // Whole tiles of keys that all rows see; m knows some score of each row before them.
  KeyRange plain_keys() const {
    if (!Products::softmax_beside || !steps_.suit_few_keys()) return {0, 0};
    const int unknown = rows_.o ? 0 : M;
    const int begin = round_up(max_of(panel_.all.begin - tile_.key_begin, unknown), M);
    const int end = min_of(panel_.all.end - tile_.key_begin, tile_.keys);
    const KeyRange whole = {begin, begin + (end - begin) / M * M};
    const bool are_plain =
        begin + M <= end && steps_.show_all(context_, {tile_.key_begin + whole.begin, tile_.key_begin + whole.end});
    return are_plain ? whole : KeyRange{0, 0};
  }

  void score_beside(KeyRange keys, PackAhead<Operand>& ahead) {
    // The softmax multiplies by the scale, unless a step comes before it.
    const bool are_scaled = steps_.change_scores();
    const float scale_left = are_scaled ? 1.0f : context_.scale.query;
    TileSoftmax<M, N> before(nullptr, &scale_left, state_);
    for (int key = keys.begin; key < keys.end; key += M) {
      const ScoreTile tile = tile_of({key, key + M});
      if (!score_tile_beside<Operand, M, N>(k_ + std::int64_t{key} * dim_words_, dim_words_, q_transposed_,
                                            are_scaled ? context_.scale.query : 1.0f, tile.scores, before, state_, ahead)) {
        score_first({key - M, key}, ahead);
      }
      steps_.change(context_, panel_, tile);
      before = {tile.scores, &scale_left, state_};
    }
    if (!before.finish(state_)) score_first({keys.end - M, keys.end}, ahead);
  }

  // All scores of some keys, then their P.
  __attribute__((noinline)) void score_first(KeyRange keys, PackAhead<Operand>& ahead) {
    if (keys.begin >= keys.end) return;
    const ScoreTile tile = tile_of(keys);
    Products::template scores<N>(k_, dim_words_, q_transposed_, keys, context_.scale.query, staircase_, tile_.scores,
                                 tile_.stride, ahead);
    const float scale_left = leave_scale<Products>(steps_, panel_, tile, context_.scale.query);
    steps_.apply(context_, panel_, tile);
    softmax_tile<N>(tile, state_, scale_left, most_above_m, [&](const float* factors) {
      for (float* p = tile_.scores; p != tile.scores; p += tile_.stride) {
        for (int n = 0; n < N; ++n) store(p + n * lanes, load(p + n * lanes) * load(factors + n * lanes));
      }
      for (int row = 0; rows_.o && row < N * lanes; ++row) {
        if (factors[row] != 1.0f) scale_row(rows_.o + std::int64_t{row} * rows_.row_size, factors[row], rows_.dims);
      }
    });
  }

  const ScoreSteps& steps_;
  const ScoreContext& context_;
  const RowPanel& panel_;
  const Staircase& staircase_;
  const ScoreTile& tile_;
  SoftmaxState& state_;
  SummedRows rows_;
  const float* k_;
  int dim_words_;
  const float* q_transposed_;
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
