// S of a panel of rows and a block of keys by matrix tiles, and P as words.
//
//   for a few keys at a time:  S = K Q^T of these keys  |  P = 2^(S - m) of the keys before them
//
// Side by side, since the unit multiplies beside what vectors do. Where steps on scores want many keys at a time, S comes
// first.
#pragma once

#include "cpu/forward_scores.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

#if FA_MATRIX_TILES

// P of a tile of scores over `scale`, two keys a step.
template <class Operand, int N>
class MatrixTileSoftmax {
  using Products = ForwardProducts<Operand>;

 public:
  MatrixTileSoftmax(const ScoreTile& tile, float scale, const float* m, const WordsOfP<Operand, N>& p, float* words)
      : scores_(tile.scores), pairs_left_(tile.keys / 2), scale_(splat(scale)), m_(m), p_(p), words_(words) {}

  // So that none is left when the product beside it ends.
  static int steps_at_once(int dim_words) {
    const int steps = Products::steps_of_tile(dim_words);
    return (Products::keys_of_tile / 2 + steps - 1) / steps;
  }

  FA_INLINE void step() {
    if (pairs_left_ == 0) return;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const float* s = scores_ + n * lanes;
      const Vec m = load(m_ + n * lanes);
      const Vec first = exp2_of(load(s) * scale_ - m);
      const Vec second = exp2_of(load(s + N * lanes) * scale_ - m);
      sum_[n] += first + second;
      p_.put(words_ + n * lanes, first, second);
    }
    scores_ += 2 * N * lanes;
    words_ += N * lanes;
    --pairs_left_;
  }

  // Takes the steps that are left, and adds P to l.
  FA_INLINE void finish(float* l) {
    while (pairs_left_ > 0) step();
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(l + n * lanes, load(l + n * lanes) + sum_[n]);
  }
  // The same, or false where a score of a product's tile is far above m: then nothing is added, and P of no use.
  FA_INLINE bool finish_if_near(float* l) {
    while (pairs_left_ > 0) step();
    IVec fits = splat(-1);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) fits &= sum_[n] < largest_sum<Products::keys_of_tile>;
    if (any_of(~fits)) return false;
    finish(l);
    return true;
  }

 private:
  const float* scores_;
  int pairs_left_;
  Vec scale_;
  const float* m_;
  WordsOfP<Operand, N> p_;
  float* words_;
  Vec sum_[N] = {};
};

template <int terms, int N>
class BlockScores<MatrixOperand<terms>, N> {
  using Operand = MatrixOperand<terms>;
  using Products = ForwardProducts<Operand>;

 public:
  BlockScores(const ScoreSteps& steps, const ScoreContext& context, const RowPanel& panel, const Staircase&,
              const ScoreTile& tile, SoftmaxState& state, SummedRows rows, float* memory_of_p)
      : steps_(steps),
        context_(context),
        panel_(panel),
        tile_(tile),
        state_(state),
        rows_(rows),
        p_{memory_of_p, words<Operand>(tile.keys)} {}

  // P after dropout, of K [keys][terms][dim words] and Q^T [terms][dim words][N vectors].
  const WordsOfP<Operand, N>& compute(const float* k, int dim_words, const float* q_transposed, PackAhead<Operand>&) {
    k_ = k;
    dim_words_ = dim_words;
    q_transposed_ = q_transposed;
    const int end = round_up(tile_.keys, M);  // keys past the last one that a row sees are hidden
    // m knows some score of each row before those beside.
    const int first = !steps_.suit_few_keys() ? end : rows_.o ? 0 : M;
    score_first({0, first});
    score_beside({first, end});
    p_.clear_from(end / 2);
    if (context_.problem->has_dropout) p_.drop(*context_.problem, *context_.inputs, panel_, tile_);
    return p_;
  }

 private:
  static constexpr int M = Products::keys_of_tile;

  ScoreTile tile_of(KeyRange keys) const {
    return {tile_.scores + keys.begin * tile_.stride, tile_.stride, keys.end - keys.begin, tile_.key_begin + keys.begin};
  }
  const float* row_of(int key) const { return k_ + std::int64_t{key} * dim_words_; }
  float* words_of(const ScoreTile& tile) const { return p_.at((tile.key_begin - tile_.key_begin) / 2); }

  void score_beside(KeyRange keys) {
    if (keys.begin >= keys.end) return;
    ScoreTile before = tile_of({keys.begin, keys.begin});
    float scale_left = 1.0f;
    for (int key = keys.begin; key < keys.end; key += M) {
      const ScoreTile tile = tile_of({key, key + M});
      if (!score_tile_beside(row_of(key), tile.scores, before, scale_left)) score_first({key - M, key});
      before = tile;
      scale_left = take_steps(before);
    }
    if (!softmax_of(before, scale_left).finish_if_near(state_.l)) score_first({keys.end - M, keys.end});
  }

  // The scores of a tile, and P of the one before. Out of line, so that its loop has all registers.
  __attribute__((noinline)) bool score_tile_beside(const float* k, float* scores, const ScoreTile& before, float scale_left) {
    struct {
      MatrixTileSoftmax<Operand, N> softmax;
      int steps;
      FA_INLINE void step() {
        for (int i = 0; i < steps; ++i) softmax.step();
      }
    } beside = {softmax_of(before, scale_left), MatrixTileSoftmax<Operand, N>::steps_at_once(dim_words_)};
    Products::template score_tile<N>(k, dim_words_, q_transposed_, scores, beside);
    return beside.softmax.finish_if_near(state_.l);
  }

  // All scores of some keys, then m, then P.
  __attribute__((noinline)) void score_first(KeyRange keys) {
    if (keys.begin >= keys.end) return;
    NothingBeside nothing;
    for (int key = keys.begin; key < keys.end; key += M) {
      Products::template score_tile<N>(row_of(key), dim_words_, q_transposed_, tile_of({key, key + M}).scores, nothing);
    }
    const ScoreTile tile = tile_of(keys);
    const float scale_left = take_steps(tile);
    raise_m_to<N>(tile, scale_left, most_above_m, state_, [&](const float* factors) {
      p_.scale(keys.begin / 2, factors);
      for (int i = 0; rows_.o && i < rows_.row_size * N; ++i) {
        store(rows_.o + i * lanes, load(rows_.o + i * lanes) * load(factors + i % N * lanes));
      }
    });
    softmax_of(tile, scale_left).finish(state_.l);
  }

  // What is left to multiply scores by after the steps on them.
  float take_steps(const ScoreTile& tile) const {
    const float scale_left = leave_scale<Products>(steps_, panel_, tile, context_.scale.query);
    steps_.apply(context_, panel_, tile);
    return scale_left;
  }

  MatrixTileSoftmax<Operand, N> softmax_of(const ScoreTile& tile, float scale_left) const {
    return {tile, scale_left, state_.m, p_, words_of(tile)};
  }

  const ScoreSteps& steps_;
  const ScoreContext& context_;
  const RowPanel& panel_;
  const ScoreTile& tile_;
  SoftmaxState& state_;
  SummedRows rows_;
  WordsOfP<Operand, N> p_;
  const float* k_;
  int dim_words_;
  const float* q_transposed_;
};

#endif

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
