// P and dS of one panel of rows against a range of keys.
#pragma once

#include "cpu/key_block.h"
#include "cpu/staircase.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

struct GradientTile {
  ScoreTile scores;           // S, then dropout(P)
  float* gradients;           // dP, then dS; same shape
  float* softcap_derivative;  // null: no softcap
};

inline void gradient_tile(const BackwardPass& pass, const RowPanel& panel, const float* lse_log2, const float* delta,
                          const GradientTile& tile) {
  const AttentionProblem& problem = *pass.problem;
  const ScoreTile& s = tile.scores;
  // Where P is 0 the key is masked, and so is whatever its V holds.
  const auto gradient = [](Vec p, Vec dp, Vec d) { return select(p == 0.0f, Vec{}, p * (dp - d)); };
  if (problem.has_dropout) {
    const Vec scale = splat(problem.dropout_scale);
    visit_dropout(problem, pass.inputs->dropout_key, panel, s.key_begin, s.keys, [&](int key, int v, IVec keep) {
      const std::int64_t i = key * s.stride + v * lanes;
      const Vec p = exp2_of(load(s.scores + i) - load(lse_log2 + v * lanes));
      const Vec kept_dp = from_bits(bits_of(load(tile.gradients + i) * scale) & keep);
      store(tile.gradients + i, gradient(p, kept_dp, load(delta + v * lanes)));
      store(s.scores + i, from_bits(bits_of(p * scale) & keep));
    });
    return;
  }
  for (int key = 0; key < s.keys; ++key) {
    for (int v = 0; v < panel.vectors; ++v) {
      const std::int64_t i = key * s.stride + v * lanes;
      const Vec p = exp2_of(load(s.scores + i) - load(lse_log2 + v * lanes));
      store(tile.gradients + i, gradient(p, load(tile.gradients + i), load(delta + v * lanes)));
      store(s.scores + i, p);
    }
  }
}

inline void multiply_softcap_derivative(const RowPanel& panel, const GradientTile& tile) {
  for (int key = 0; key < tile.scores.keys; ++key) {
    for (int v = 0; v < panel.vectors; ++v) {
      const std::int64_t i = key * tile.scores.stride + v * lanes;
      store(tile.gradients + i, load(tile.gradients + i) * load(tile.softcap_derivative + i));
    }
  }
}

// S^T, dP^T, then P and dS of one panel against keys [begin, begin + count) of the block, at column `column` of the tiles.
template <class Operand, int N>
inline void panel_gradients(const BackwardPass& pass, const ScoreSteps& steps, const KeyBlockBuffers& buffers, KeyBlock keys,
                            int begin, int count, const Staircase& staircase, const RowPanel& panel, const RowBlock& rows,
                            int column) {
  const AttentionProblem& problem = *pass.problem;
  const std::int64_t first = std::int64_t{begin} * row_block + column;
  const bool softcap = problem.softcap > 0;
  const GradientTile tile = {{buffers.scores + first, row_block, count, keys.begin + begin},
                             buffers.gradients + first,
                             softcap ? buffers.derivative + first : nullptr};
  const ScoreContext context = {pass.problem,           pass.inputs, nullptr, ScoreScale(problem), buffers.mask_rows, keys.size,
                                tile.softcap_derivative};
  const int dim_words = words<Operand>(problem.head_dim);
  const int dim_v_words = words<Operand>(problem.head_dim_v);
  const int first_vector = column / lanes;
  staircase_scores<Operand, N>(buffers.k_rows + std::int64_t{begin} * dim_words, dim_words,
                               rows.q_transposed + std::int64_t{column} * problem.head_dim, count, context.scale.query,
                               staircase, tile.scores.scores, row_block, first_vector);
  staircase_scores<Operand, N>(buffers.v_rows + std::int64_t{begin} * dim_v_words, dim_v_words,
                               rows.dout_transposed + std::int64_t{column} * problem.head_dim_v, count, 1.0f, staircase,
                               tile.gradients, row_block, first_vector);
  steps.apply(context, panel, tile.scores);
  gradient_tile(pass, panel, rows.lse_log2 + column, rows.delta + column, tile);
}

template <class Operand>
inline void panel_gradients(const BackwardPass& pass, const ScoreSteps& steps, const KeyBlockBuffers& buffers, KeyBlock keys,
                            int begin, int count, const Staircase& staircase, const RowPanel& panel, const RowBlock& rows,
                            int column) {
  switch (panel.vectors) {
    case 1:
      return panel_gradients<Operand, 1>(pass, steps, buffers, keys, begin, count, staircase, panel, rows, column);
    case 2:
      return panel_gradients<Operand, 2>(pass, steps, buffers, keys, begin, count, staircase, panel, rows, column);
    default:
      return panel_gradients<Operand, 3>(pass, steps, buffers, keys, begin, count, staircase, panel, rows, column);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
