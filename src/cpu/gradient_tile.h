// P and dS of one panel of rows against a range of keys.
#pragma once

#include "cpu/backward_products.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

inline void gradient_tile(const BackwardPass& pass, const RowPanel& panel, const float* lse_log2, const float* delta,
                          float scale_left, const GradientTile& tile) {
  const AttentionProblem& problem = *pass.problem;
  const ScoreTile& s = tile.scores;
  const auto probability = [&](std::int64_t i, int v) {
    return exp2_of(load(s.scores + i) * scale_left - load(lse_log2 + v * lanes));
  };
  // Where P is 0 the key is masked, and so is whatever its V holds.
  const auto gradient = [](Vec p, Vec dp, Vec d) { return select(p == 0.0f, Vec{}, p * (dp - d)); };
  if (problem.has_dropout) {
    const Vec scale = splat(problem.dropout_scale);
    visit_dropout(problem, pass.inputs->dropout_key, panel, s.key_begin, s.keys, [&](int key, int v, IVec keep) {
      const std::int64_t i = key * s.stride + v * lanes;
      const Vec p = probability(i, v);
      const Vec kept_dp = from_bits(bits_of(load(tile.gradients + i) * scale) & keep);
      store(tile.gradients + i, gradient(p, kept_dp, load(delta + v * lanes)));
      store(s.scores + i, from_bits(bits_of(p * scale) & keep));
    });
    return;
  }
  for (int key = 0; key < s.keys; ++key) {
    for (int v = 0; v < panel.vectors; ++v) {
      const std::int64_t i = key * s.stride + v * lanes;
      const Vec p = probability(i, v);
      store(tile.gradients + i, gradient(p, load(tile.gradients + i), load(delta + v * lanes)));
      store(s.scores + i, p);
    }
  }
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
};

// S^T, dP^T, then P and dS of the panel at `column` of the rows. visit(tile, key) as soon as a tile is ready; `key` is its
// first, counted from the block's.
template <class Operand, int N, class Visit>
inline void panel_gradients(const GradientContext<Operand>& context, const BlockPair<Operand>& pair, const RowPanel& panel,
                            int column, Visit visit) {
  using Products = BackwardProducts<Operand>;
  const BackwardPass& pass = context.pass;
  const AttentionProblem& problem = *pass.problem;
  const KeyBlockBuffers<Operand>& buffers = context.buffers;
  const ScoreScale scale(problem);
  const int dim_words = words<Operand>(problem.head_dim);
  const int dim_v_words = words<Operand>(problem.head_dim_v);
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
    Products::template scores<N>(pair, column, buffers.v_rows + std::int64_t{key} * dim_v_words, dim_v_words, dout, count, 1.0f,
                                 tile.gradients, s.stride);
    const float scale_left = leave_scale<Products>(context.steps, panel, s, scale.query);
    context.steps.apply({pass.problem, pass.inputs, nullptr, scale, buffers.mask_rows, pair.keys.size, tile.softcap_derivative},
                        panel, s);
    gradient_tile(pass, panel, pair.rows.lse_log2 + column, pair.rows.delta + column, scale_left, tile);
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
