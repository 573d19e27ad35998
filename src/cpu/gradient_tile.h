// P and dS of one panel of rows against a range of keys.
#pragma once

#include "cpu/backward_products.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

FA_INLINE Vec probability(Vec score, float scale_left, Vec lse_log2) { return exp2_of(score * scale_left - lse_log2); }

// dS. Where P is 0 the key is masked, and so is whatever its V holds.
FA_INLINE Vec gradient(Vec p, Vec dp, Vec delta) { return select(p == 0.0f, Vec{}, p * (dp - delta)); }

// P and dS from S and dP.
inline void gradient_tile(const BackwardPass& pass, const RowPanel& panel, const float* lse_log2, const float* delta,
                          float scale_left, const GradientTile& tile) {
  const AttentionProblem& problem = *pass.problem;
  const ScoreTile& s = tile.scores;
  const auto p_of = [&](std::int64_t i, int v) {
    return probability(load(s.scores + i), scale_left, load(lse_log2 + v * lanes));
  };
  if (problem.has_dropout) {
    const Vec scale = splat(problem.dropout_scale);
    visit_dropout(problem, pass.inputs->dropout_key, panel, s.key_begin, s.keys, [&](int key, int v, IVec keep) {
      const std::int64_t i = key * s.stride + v * lanes;
      const Vec p = p_of(i, v);
      const Vec kept_dp = from_bits(bits_of(load(tile.gradients + i) * scale) & keep);
      store(tile.gradients + i, gradient(p, kept_dp, load(delta + v * lanes)));
      store(s.scores + i, from_bits(bits_of(p * scale) & keep));
    });
    return;
  }
  for (int key = 0; key < s.keys; ++key) {
    for (int v = 0; v < panel.vectors; ++v) {
      const std::int64_t i = key * s.stride + v * lanes;
      const Vec p = p_of(i, v);
      store(tile.gradients + i, gradient(p, load(tile.gradients + i), load(delta + v * lanes)));
      store(s.scores + i, p);
    }
  }
}

// P of M keys by N vectors of rows, in place of S, a key a step. As forward's TileSoftmax takes its steps; one class for both
// has the same bits, but bfloat16's backward took 2 to 4 % longer.
template <int M, int N>
class TileProbabilities {
 public:
  TileProbabilities(float* scores, std::int64_t stride, const float* lse_log2)
      : next_(scores), stride_(stride), end_(scores + M * stride), lse_log2_(lse_log2) {}

  FA_INLINE void step() {
    if (next_ == end_) return;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      store(next_ + n * lanes, probability(load(next_ + n * lanes), 1.0f, load(lse_log2_ + n * lanes)));
    }
    next_ += stride_;
  }
  FA_INLINE void finish() {
    while (next_ != end_) step();
  }

 private:
  float* next_;
  std::int64_t stride_;
  float* end_;
  const float* lse_log2_;
};

// dS [M keys][W vectors of rows] = P (dP - delta), where dP^T = V [M][dim words] dO^T [dim words][N vectors]; beside that
// product, or before it, S [M][N vectors] becomes P. Of these, `first` is the first of the W. Out of line, so that its loop has
// all registers. P and dS go to `words` where that is not null, dS times softcap's derivative.
template <class Operand, int M, int W, int N>
__attribute__((noinline)) void gradient_product(const float* v, int dim_words, const float* dout, const float* lse_log2,
                                                const float* delta, int first, const GradientTile& tile,
                                                const GradientWords* words) {
  float* scores = tile.scores.scores;
  const std::int64_t stride = tile.scores.stride;
  TileProbabilities<M, N> probabilities(scores, stride, lse_log2);
  dout += first * lanes;
  Vec dp[M][W] = {};
  if constexpr (softmax_beside) {
    matmul_tile<Operand, M, W>(dp, v, dim_words, 1, dout, N * lanes, dim_words, probabilities);
    probabilities.finish();
  } else {
    probabilities.finish();
    matmul_tile<Operand, M, W>(dp, v, dim_words, 1, dout, N * lanes, dim_words);
  }
  const auto ds_of = [&](int m, int w) FA_INLINE_IF_FAST {
    const std::int64_t i = m * stride + (first + w) * lanes;
    return gradient(load(scores + i), dp[m][w], load(delta + (first + w) * lanes));
  };
  if (!words) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) store(tile.gradients + m * stride + (first + w) * lanes, ds_of(m, w));
    }
  } else if constexpr (Operand::per_word == 2) {
#pragma GCC unroll 4
    for (int m = 0; m < M; m += 2) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        Vec ds[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const std::int64_t from = (m + i) * stride + (first + w) * lanes;
          const std::int64_t to = (m + i) * words->stride + (first + w) * lanes / 2;
          ds[i] = ds_of(m + i, w);
          if (tile.softcap_derivative) ds[i] *= load(tile.softcap_derivative + from);
          store_half(words->p_rows + to, load(scores + from));
          store_half(words->ds_rows + to, ds[i]);
        }
        store(words->ds_keys + m / 2 * words->stride + (first + w) * lanes, Operand::word(ds));
      }
    }
  }
}

// Words of M keys and N vectors of rows, but for [first, first + count).
template <int M, int N>
FA_INLINE void clear_unseen_words(const GradientWords& words, int first, int count) {
  if (count == N) return;
  for (int n = 0; n < N; ++n) {
    if (n >= first && n < first + count) continue;
    for (int m = 0; m < M; ++m) {
      store_half(words.p_rows + m * words.stride + n * lanes / 2, Vec{});
      store_half(words.ds_rows + m * words.stride + n * lanes / 2, Vec{});
    }
    for (int m = 0; m < M / 2; ++m) store(words.ds_keys + m * words.stride + n * lanes, Vec{});
  }
}

// P and dS of the panel at `column` of the rows, whose tile begins with the block's key `key`; as words where a product takes
// them so.
template <class Operand, int N>
inline void gradients_from_registers(const BackwardProducts<Operand>& products, const BlockPair<Operand>& pair, int first_key,
                                     int column, const float* v_rows, int dim_words, const float* dout, const float* lse_log2,
                                     const float* delta, const GradientTile& tile, bool as_words) {
  constexpr int M = score_keys<N>;
  const std::int64_t stride = tile.scores.stride;
  for_each_seen_tile<M, N>(
      {0, tile.scores.keys}, pair.staircase, column, [&](int key, int first, auto count) FA_INLINE_IF_FAST {
        const GradientTile some = {{tile.scores.scores + key * stride, stride, M, tile.scores.key_begin + key},
                                   tile.gradients + key * stride,
                                   tile.softcap_derivative ? tile.softcap_derivative + key * stride : nullptr};
        const GradientWords words = products.words_from(pair, first_key + key, column);
        if constexpr (count > 0) {
          gradient_product<Operand, M, count, N>(v_rows + std::int64_t{key} * dim_words, dim_words, dout, lse_log2, delta,
                                                 first, some, as_words ? &words : nullptr);
        } else if (!as_words) {
          TileProbabilities<M, N>(some.scores.scores, stride, lse_log2).finish();
        }
        if (as_words) {
          clear_unseen_words<M, N>(words, first, count);
        } else {
          clear_unseen<M, N>(some.gradients, stride, first, count);
        }
      });
}

inline void multiply_softcap_derivative(const RowPanel& panel, const GradientTile& tile) {
  if (!tile.softcap_derivative) return;
  for (int key = 0; key < tile.scores.keys; ++key) {
    for (int v = 0; v < panel.vectors; ++v) {
      const std::int64_t i = key * tile.scores.stride + v * lanes;
      store(tile.gradients + i, load(tile.gradients + i) * load(tile.softcap_derivative + i));
    }
  }
}

// What P and dS of a panel are made from, besides the panel.
template <class Operand>
struct GradientContext {
  const BackwardPass& pass;
  const ScoreSteps& steps;
  const KeyBlockBuffers<Operand>& buffers;
  const BackwardProducts<Operand>& products;
  bool as_words;  // P and dS are wanted so, see gradients_are_words
};

// Whether P and dS are made while dP is in registers.
template <class Operand>
inline bool gradients_are_in_registers(const AttentionProblem& problem) {
  return BackwardProducts<Operand>::gradients_in_registers && !problem.has_dropout;
}

// Whether P and dS become words as soon as there is dP, so that nobody else turns them.
template <class Operand>
inline bool gradients_are_words(const AttentionProblem& problem) {
  return Operand::per_word > 1 && gradients_are_in_registers<Operand>(problem);
}

// S^T, dP^T, P and dS of the panel at `column` of the rows. visit(tile, key) as soon as a tile is ready; `key` is its
// first, counted from the block's.
template <class Operand, int N, class Visit>
inline void panel_gradients(const GradientContext<Operand>& context, const BlockPair<Operand>& pair, const RowPanel& panel,
                            int column, Visit visit) {
  using Products = BackwardProducts<Operand>;
  const BackwardPass& pass = context.pass;
  const AttentionProblem& problem = *pass.problem;
  const KeyBlockBuffers<Operand>& buffers = context.buffers;
  const ScoreScale scale(problem);
  const int dim_words = row_words<Operand>(problem.head_dim);
  const int dim_v_words = row_words<Operand>(problem.head_dim_v);
  const float* q = pair.rows.q_transposed + std::int64_t{column} * dim_words;
  const float* dout = pair.rows.dout_transposed + std::int64_t{column} * dim_v_words;

  const KeyRange keys = context.products.keys_of_panel(pair, column, N);
  for (int key = keys.begin; key < keys.end; key += Products::keys_at_once) {
    const int count = min_of(Products::keys_at_once, keys.end - key);
    GradientTile tile = context.products.template tile<N>(pair, key, count, column);
    if (problem.softcap <= 0) tile.softcap_derivative = nullptr;
    const ScoreTile& s = tile.scores;
    Products::template scores<N>(pair, column, buffers.k_rows + std::int64_t{key} * dim_words, dim_words, q, count, scale.query,
                                 s.scores, s.stride);
    const float scale_left = leave_scale<Products>(context.steps, panel, s, scale.query);
    context.steps.apply({pass.problem, pass.inputs, nullptr, scale, buffers.mask_rows, pair.keys.size, tile.softcap_derivative},
                        panel, s);
    const float* v_rows = buffers.v_rows + std::int64_t{key} * dim_v_words;
    const float* lse_log2 = pair.rows.lse_log2 + column;
    const float* delta = pair.rows.delta + column;
    const bool in_registers = gradients_are_in_registers<Operand>(problem);
    if constexpr (Products::gradients_in_registers) {
      if (in_registers) {
        gradients_from_registers<Operand, N>(context.products, pair, key, column, v_rows, dim_v_words, dout, lse_log2, delta,
                                             tile, context.as_words);
      }
    }
    if (!in_registers) {
      Products::template scores<N>(pair, column, v_rows, dim_v_words, dout, count, 1.0f, tile.gradients, s.stride);
      gradient_tile(pass, panel, lse_log2, delta, scale_left, tile);
    }
    visit(Constant<N>{}, tile, key);
  }
}

template <class Operand, class Visit>
inline void panel_gradients(const GradientContext<Operand>& context, const BlockPair<Operand>& pair, const RowPanel& panel,
                            int column, Visit visit) {
  switch (panel.vectors) {
    case 1:
      return panel_gradients<Operand, 1>(context, pair, panel, column, visit);
    case 2:
      return panel_gradients<Operand, 2>(context, pair, panel, column, visit);
    default:
      return panel_gradients<Operand, 3>(context, pair, panel, column, visit);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
