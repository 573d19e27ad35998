// Backward (FlashAttention-2, algorithm 2), rows in lanes. One call owns a block of keys and walks the rows that see it:
//
//   for each block of rows:
//     S^T  = K Q^T, through the same steps as forward      [keys][rows]
//     P    = 2^(S - lse);  dP^T = V dO^T
//     dV  += dropout(P)^T dO
//     dS   = P (dropout(dP) - D),  D = rowsum(dO * O) - dlse
//     dS  *= softcap'
//     dK  += dS^T Q
//     dQ  += dS K                                           in ascending order of key blocks
//
// dK and dV stay in cache and belong to one thread; dQ is handed from key block to key block, so every sum has one order.
#pragma once

#include <sched.h>

#include "cpu/products.h"
#include "cpu/score_steps.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int row_block_panels = 2;
constexpr int row_block = row_block_panels * panel_rows;

// ---- rows: Q and dO of a row block in both layouts, and what else backward needs of a row

struct RowBlock {
  float* q_transposed;     // [panel][head_dim][width], scaled
  float* dout_transposed;  // [panel][head_dim_v][width]
  float* q_panels;         // [dim panels][row_block][dim_panel]
  float* dout_panels;
  float* lse_log2;  // [row_block]
  float* delta;     // [row_block]  D

  static std::int64_t size(const AttentionProblem& problem) {
    const std::int64_t dims = problem.head_dim + problem.head_dim_v;
    const std::int64_t padded = round_up(problem.head_dim, dim_panel) + round_up(problem.head_dim_v, dim_panel);
    return row_block * (dims + padded + 2);
  }

  RowBlock(const AttentionProblem& problem, float* memory) {
    const auto take = [&memory](std::int64_t size) { return (memory += size) - size; };
    q_panels = take(std::int64_t{row_block} * round_up(problem.head_dim, dim_panel));
    dout_panels = take(std::int64_t{row_block} * round_up(problem.head_dim_v, dim_panel));
    lse_log2 = take(row_block);
    delta = take(row_block);
    q_transposed = take(std::int64_t{row_block} * problem.head_dim);
    dout_transposed = take(std::int64_t{row_block} * problem.head_dim_v);
  }
};

inline std::int64_t row_block_size(const AttentionProblem& problem) { return RowBlock::size(problem); }

inline void prepare_row(const BackwardPass& pass, const Unit& unit, const RowPanel& panel, int lane, int row,
                        const RowBlock& block) {
  const AttentionProblem& problem = *pass.problem;
  const BackwardInputs& saved = *pass.saved;
  const auto read = [&](const ConstTensor& tensor, int dim, float* values) {
    const std::int64_t offset = panel.offset(unit, tensor.strides, lane);
    read_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, dim, values);
  };
  float values[max_head_dim];
  read(pass.inputs->q, problem.head_dim, values);
  scatter_to_panels(values, problem.head_dim, block.q_panels + row * dim_panel, row_block * dim_panel);
  float dout[max_head_dim];
  read(saved.dout, problem.head_dim_v, dout);
  scatter_to_panels(dout, problem.head_dim_v, block.dout_panels + row * dim_panel, row_block * dim_panel);

  read(saved.out, problem.head_dim_v, values);
  float delta = 0.0f;
  for (int d = 0; d < problem.head_dim_v; ++d) delta += dout[d] * values[d];
  const float lse = saved.lse[panel.offset(unit, saved.lse_strides, lane)];
  // A row without keys has only masked scores: any finite lse makes their probabilities 0.
  block.lse_log2[row] = lse == -__builtin_inff() ? 0.0f : lse * log2_e;
  block.delta[row] = delta - saved.dlse[panel.offset(unit, saved.dlse_strides, lane)];
}

inline void prepare_rows(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, float* memory) {
  const AttentionProblem& problem = *pass.problem;
  const RowBlock block(problem, memory);
  const int row_end = min_of(row_begin + row_block, unit.packed_rows());
  for (int row = row_begin; row < row_end; row += panel_rows) {
    const RowPanel panel(problem, *pass.inputs, unit, row, row_end);
    const int first = row - row_begin;
    pack_transposed(panel, unit, pass.inputs->q, problem.head_dim, ScoreScale(problem).query,
                    block.q_transposed + std::int64_t{first} * problem.head_dim);
    pack_transposed(panel, unit, pass.saved->dout, problem.head_dim_v, 1.0f,
                    block.dout_transposed + std::int64_t{first} * problem.head_dim_v);
    for (int lane = 0; lane < panel.width(); ++lane) prepare_row(pass, unit, panel, lane, first + lane, block);
  }
}

// A sink is a key whose value is 0: d sink = -P_sink D. Adds each row of the block to its head, in order.
inline void add_sink_gradient(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, const float* memory,
                              double* dsink) {
  const RowBlock block(*pass.problem, const_cast<float*>(memory));
  const int rows = min_of(row_block, unit.packed_rows() - row_begin);
  for (int row = 0; row < rows; ++row) {
    const int head = unit.first_head + (row_begin + row) % unit.group;
    const float p = __builtin_exp2f(pass.inputs->learnable_sink[head] * log2_e - block.lse_log2[row]);
    if (p != 0.0f) dsink[head] -= static_cast<double>(p) * block.delta[row];
  }
}

// ---- P and dS of one panel against a range of keys

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

// ---- a key block

struct KeyBlockBuffers {
  float* k_rows;    // [key_block][head_dim]
  float* v_rows;    // [key_block][head_dim_v]
  float* k_panels;  // [dim panels][key_block][dim_panel], non-finite values as 0
  float* dk;        // [dim panels][key_block][dim_panel]
  float* dv;
  float* scores;      // [key_block][row_block]  S, P
  float* gradients;   // [key_block][row_block]  dP, dS
  float* derivative;  // [key_block][row_block]
  float* mask_rows;   // [lanes][key_block]; a multiple of lanes

  static std::int64_t size(const AttentionProblem& problem, std::int32_t key_block) {
    const std::int64_t k_padded = round_up(problem.head_dim, dim_panel);
    const std::int64_t v_padded = round_up(problem.head_dim_v, dim_panel);
    return key_block * (problem.head_dim + problem.head_dim_v + 2 * k_padded + v_padded + 3 * row_block + lanes);
  }

  KeyBlockBuffers(const AttentionProblem& problem, std::int32_t key_block, float* memory) {
    const auto take = [&](std::int64_t per_key) { return (memory += key_block * per_key) - key_block * per_key; };
    scores = take(row_block);
    gradients = take(row_block);
    derivative = take(row_block);
    k_panels = take(round_up(problem.head_dim, dim_panel));
    dk = take(round_up(problem.head_dim, dim_panel));
    dv = take(round_up(problem.head_dim_v, dim_panel));
    mask_rows = take(lanes);
    k_rows = take(problem.head_dim);
    v_rows = take(problem.head_dim_v);
  }
};

inline std::int64_t backward_scratch_size(const BackwardPass& pass) {
  return KeyBlockBuffers::size(*pass.problem, pass.key_block);
}

inline void pack_key_block(const BackwardPass& pass, const Unit& unit, KeyBlock keys, const KeyBlockBuffers& buffers) {
  const AttentionProblem& problem = *pass.problem;
  pack_rows(pass.inputs->k, unit, keys, problem.head_dim, buffers.k_rows);
  pack_rows(pass.inputs->v, unit, keys, problem.head_dim_v, buffers.v_rows);
  float row[max_head_dim];
  for (int key = 0; key < keys.size; ++key) {
    const float* k = buffers.k_rows + std::int64_t{key} * problem.head_dim;
    // For dQ only: a row that sees a NaN in K has NaN in dS; a row that does not must not meet it as 0 * NaN.
    for (int d = 0; d < problem.head_dim; ++d) row[d] = k[d] - k[d] == 0.0f ? k[d] : 0.0f;
    scatter_to_panels(row, problem.head_dim, buffers.k_panels + key * dim_panel, keys.size * dim_panel);
  }
}

// S^T, dP^T, then P and dS of one panel against keys [begin, begin + count) of the block, at column `column` of the tiles.
template <int N>
inline void panel_gradients(const BackwardPass& pass, const ScoreSteps& steps, const KeyBlockBuffers& buffers, KeyBlock keys,
                            int begin, int count, const RowPanel& panel, const RowBlock& rows, int column) {
  const AttentionProblem& problem = *pass.problem;
  const std::int64_t first = std::int64_t{begin} * row_block + column;
  const bool softcap = problem.softcap > 0;
  const GradientTile tile = {{buffers.scores + first, row_block, count, keys.begin + begin},
                             buffers.gradients + first,
                             softcap ? buffers.derivative + first : nullptr};
  const ScoreContext context = {pass.inputs, ScoreScale(problem), buffers.mask_rows, keys.size, tile.softcap_derivative};
  score_product<N>(buffers.k_rows + std::int64_t{begin} * problem.head_dim, problem.head_dim,
                   rows.q_transposed + std::int64_t{column} * problem.head_dim, count, tile.scores.scores, row_block);
  score_product<N>(buffers.v_rows + std::int64_t{begin} * problem.head_dim_v, problem.head_dim_v,
                   rows.dout_transposed + std::int64_t{column} * problem.head_dim_v, count, tile.gradients, row_block);
  steps.apply(context, panel, tile.scores);
  gradient_tile(pass, panel, rows.lse_log2 + column, rows.delta + column, tile);
}

inline void panel_gradients(const BackwardPass& pass, const ScoreSteps& steps, const KeyBlockBuffers& buffers, KeyBlock keys,
                            int begin, int count, const RowPanel& panel, const RowBlock& rows, int column) {
  switch (panel.vectors) {
    case 1:
      return panel_gradients<1>(pass, steps, buffers, keys, begin, count, panel, rows, column);
    case 2:
      return panel_gradients<2>(pass, steps, buffers, keys, begin, count, panel, rows, column);
    default:
      return panel_gradients<3>(pass, steps, buffers, keys, begin, count, panel, rows, column);
  }
}

inline void wait_for_turn(const std::int32_t* turn, std::int32_t mine) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; ++spins) {
    if (spins > 100) sched_yield();
  }
}

inline void write_key_gradients(const Tensor& tensor, const Unit& unit, KeyBlock keys, int dim, float scale,
                                const float* panels) {
  if (!tensor.data) return;
  float row[max_head_dim + dim_panel];
  for (int i = 0; i < min_of(keys.size, unit.sequence.k.length - keys.begin); ++i) {
    for (int p = 0; p < panels_of(dim); ++p) {
      const float* source = panels + (std::int64_t{p} * keys.size + i) * dim_panel;
      for (int n = 0; n < dim_vectors; ++n) store(row + p * dim_panel + n * lanes, load(source + n * lanes) * scale);
    }
    const std::int64_t slot = unit.sequence.k.begin + std::int64_t{keys.begin} + i;
    const std::int64_t offset =
        unit.batch * tensor.strides.batch + slot * tensor.strides.seq + unit.kv_head * tensor.strides.head;
    write_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, dim, row);
  }
}

inline void backward_keys(const BackwardPass& pass, const BackwardTask& task, float* scratch) {
  const AttentionProblem& problem = *pass.problem;
  const Unit& unit = *task.unit;
  const KeyBlock keys = {task.block * pass.key_block, pass.key_block};
  const KeyBlockBuffers buffers(problem, pass.key_block, scratch);
  const ScoreSteps steps(problem, *pass.inputs);
  const int k_panels = panels_of(problem.head_dim);
  const int v_panels = panels_of(problem.head_dim_v);
  const std::int64_t key_panel_stride = std::int64_t{keys.size} * dim_panel;
  const std::int64_t row_panel_stride = row_block * dim_panel;
  constexpr int M = value_rows<3>;

  pack_key_block(pass, unit, keys, buffers);
  std::memset(buffers.dk, 0, sizeof(float) * static_cast<std::size_t>(k_panels * key_panel_stride));
  std::memset(buffers.dv, 0, sizeof(float) * static_cast<std::size_t>(v_panels * key_panel_stride));

  for (int row_begin = 0, index = 0; row_begin < unit.packed_rows(); row_begin += row_block, ++index) {
    const int row_end = min_of(row_begin + row_block, unit.packed_rows());
    const KeyRange seen = visible_keys_of_packed_rows(unit, row_begin, row_end);
    const int begin = max_of(seen.begin - keys.begin, 0) / tile_keys * tile_keys;
    const int end = min_of(round_up(seen.end - keys.begin, tile_keys), keys.size);
    if (seen.begin >= seen.end || begin >= end) continue;

    const RowBlock rows(problem, task.rows + index * pass.row_block_size);
    for (int row = row_begin; row < row_end; row += panel_rows) {
      const RowPanel panel(problem, *pass.inputs, unit, row, row_end);
      panel_gradients(pass, steps, buffers, keys, begin, end - begin, panel, rows, row - row_begin);
      if (problem.softcap > 0) {
        const std::int64_t first = std::int64_t{begin} * row_block + row - row_begin;
        multiply_softcap_derivative(
            panel,
            {{buffers.scores + first, row_block, end - begin, 0}, buffers.gradients + first, buffers.derivative + first});
      }
    }

    const float* p = buffers.scores + std::int64_t{begin} * row_block;
    const float* ds = buffers.gradients + std::int64_t{begin} * row_block;
    const std::int64_t first_key = std::int64_t{begin} * dim_panel;
    panel_product<M>(p, row_block, 1, rows.dout_panels, row_panel_stride, row_end - row_begin, end - begin, v_panels,
                     buffers.dv + first_key, key_panel_stride);
    panel_product<M>(ds, row_block, 1, rows.q_panels, row_panel_stride, row_end - row_begin, end - begin, k_panels,
                     buffers.dk + first_key, key_panel_stride);
    if (!task.dq) continue;
    if (task.dq_turns) wait_for_turn(task.dq_turns + index, task.block);
    panel_product<M>(ds, 1, row_block, buffers.k_panels + first_key, key_panel_stride, end - begin,
                     round_up(row_end - row_begin, M), k_panels, task.dq + index * pass.dq_block_size, row_panel_stride);
    if (task.dq_turns) __atomic_store_n(task.dq_turns + index, task.block + 1, __ATOMIC_RELEASE);
  }
  write_key_gradients(pass.gradients->dk, unit, keys, problem.head_dim, problem.softmax_scale, buffers.dk);
  write_key_gradients(pass.gradients->dv, unit, keys, problem.head_dim_v, 1.0f, buffers.dv);
}

// ---- dQ of a row block to the caller's array

inline std::int64_t dq_block_size(const AttentionProblem& problem) {
  return std::int64_t{row_block} * round_up(problem.head_dim, dim_panel);
}

inline void write_query_gradients(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, const float* dq) {
  const AttentionProblem& problem = *pass.problem;
  const Tensor& tensor = pass.gradients->dq;
  float values[max_head_dim + dim_panel];
  const int row_end = min_of(row_begin + row_block, unit.packed_rows());
  for (int row = row_begin; row < row_end; row += panel_rows) {
    const RowPanel panel(problem, *pass.inputs, unit, row, row_end);
    for (int lane = 0; lane < panel.rows; ++lane) {
      for (int p = 0; p < panels_of(problem.head_dim); ++p) {
        const float* source = dq + (std::int64_t{p} * row_block + row - row_begin + lane) * dim_panel;
        for (int n = 0; n < dim_vectors; ++n) {
          store(values + p * dim_panel + n * lanes, load(source + n * lanes) * problem.softmax_scale);
        }
      }
      const std::int64_t offset = panel.offset(unit, tensor.strides, lane);
      write_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, problem.head_dim, values);
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
