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

#include "cpu/gradient_tile.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// A tile [keys][row_block] as a left operand: words of neighbouring rows, in place, for products over rows.
template <class Operand>
inline void pack_along_rows(float* tile, int keys, int rows) {
  if constexpr (Operand::per_word > 1) {
    for (int key = 0; key < keys; ++key) pack_row<Operand>(tile + key * row_block, rows, tile + key * row_block);
  }
}

inline void wait_for_turn(const std::int32_t* turn, std::int32_t mine) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; ++spins) {
    if (spins > 100) sched_yield();
  }
}

template <class Operand>
inline void backward_keys(const BackwardPass& pass, const BackwardTask& task, float* scratch) {
  const AttentionProblem& problem = *pass.problem;
  const Unit& unit = *task.unit;
  const KeyBlock keys = {task.block * pass.key_block, pass.key_block};
  const KeyBlockBuffers buffers(problem, pass.key_block, scratch);
  const ScoreSteps steps(problem, *pass.inputs);
  const int k_panels = panels_of(problem.head_dim);
  const int v_panels = panels_of(problem.head_dim_v);
  const std::int64_t gradient_stride = std::int64_t{keys.size} * dim_panel;
  const std::int64_t key_stride = std::int64_t{words<Operand>(keys.size)} * dim_panel;
  const std::int64_t row_stride = words<Operand>(row_block) * dim_panel;
  constexpr int M = value_rows<3>;

  pack_key_block<Operand>(pass, unit, keys, buffers);
  std::memset(buffers.dk, 0, sizeof(float) * static_cast<std::size_t>(k_panels * gradient_stride));
  std::memset(buffers.dv, 0, sizeof(float) * static_cast<std::size_t>(v_panels * gradient_stride));

  for (int row_begin = 0, index = 0; row_begin < unit.packed_rows(); row_begin += row_block, ++index) {
    const int row_count = min_of(row_block, unit.packed_rows() - row_begin);
    const auto [begin, end] = tiles_seen(visible_keys_of_packed_rows(unit, row_begin, row_begin + row_count), keys);
    if (begin >= end) continue;
    const int count = end - begin;
    const std::int64_t first = std::int64_t{begin} * row_block;

    const RowBlock rows(problem, task.rows + index * pass.row_block_size);
    Staircase staircase;
    for (int column = 0; column < row_count; column += panel_rows) {
      const RowPanel panel(problem, *pass.inputs, unit, row_begin + column, row_begin + row_count);
      staircase.add(panel, keys.begin + begin, count);
      panel_gradients<Operand>(pass, steps, buffers, keys, begin, count, staircase, panel, rows, column);
      if (problem.softcap > 0) {
        multiply_softcap_derivative(panel, {{buffers.scores + first + column, row_block, count, 0},
                                            buffers.gradients + first + column,
                                            buffers.derivative + first + column});
      }
    }

    float* p = buffers.scores + first;
    float* ds = buffers.gradients + first;
    const float* ds_by_keys = pack_along_keys<Operand>(ds, row_block, count, buffers.derivative);
    pack_along_rows<Operand>(p, count, row_count);
    pack_along_rows<Operand>(ds, count, row_count);
    const int row_words = words<Operand>(row_count);
    const auto rows_of_keys = [&](int key) -> KeyRange {
      const RowSpan span = staircase.rows_of_keys(key, M);
      return {span.begin / Operand::per_word, min_of(span.end / Operand::per_word, row_words)};
    };
    const auto keys_of_rows = [&](int row) -> KeyRange {
      const KeyRange seen = staircase.keys_of_rows(row, M);
      return {seen.begin / Operand::per_word, words<Operand>(seen.end)};
    };
    panel_product<Operand, M>(p, row_block, 1, rows.dout_panels, row_stride, count, v_panels,
                              buffers.dv + std::int64_t{begin} * dim_panel, gradient_stride, rows_of_keys);
    panel_product<Operand, M>(ds, row_block, 1, rows.q_panels, row_stride, count, k_panels,
                              buffers.dk + std::int64_t{begin} * dim_panel, gradient_stride, rows_of_keys);
    if (!task.dq) continue;
    if (task.dq_turns) wait_for_turn(task.dq_turns + index, task.block);
    panel_product<Operand, M>(ds_by_keys, 1, row_block, buffers.k_panels + std::int64_t{begin / Operand::per_word} * dim_panel,
                              key_stride, round_up(row_count, M), k_panels, task.dq + index * pass.dq_block_size,
                              row_block * dim_panel, keys_of_rows);
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
  float values[padded_head_dim];
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
