// Gradient of an additive attn_mask: dS itself (the mask is added after softcap), summed over whatever the mask broadcasts
// over. A pass of its own over S and dP, taken only when that gradient is wanted: it owns its output, so sums keep one order.
#pragma once

#include "cpu/gradient_tile.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

inline std::int64_t mask_gradient_scratch_size(const BackwardPass& pass) {
  return KeyBlockBuffers::size(*pass.problem, pass.key_block) + pass.row_block_size;
}

// Adds dS of one row block against one key block to task.dmask.
template <class Operand>
inline void add_mask_gradient(const BackwardPass& pass, const MaskGradientTask& task, float* scratch) {
  const AttentionProblem& problem = *pass.problem;
  const Unit& unit = *task.unit;
  const KeyBlock keys = {task.block * pass.key_block, pass.key_block};
  const int row_end = min_of(task.row_begin + row_block, unit.packed_rows());
  const auto [begin, end] = tiles_seen(visible_keys_of_packed_rows(unit, task.row_begin, row_end), keys);
  if (begin >= end) return;

  const KeyBlockBuffers buffers(problem, pass.key_block, scratch + pass.row_block_size);
  const RowBlock rows(problem, scratch);
  const ScoreSteps steps(problem, *pass.inputs);
  prepare_rows<Operand>(pass, unit, task.row_begin, scratch);
  pack_key_rows<Operand>(problem, KeyReader(problem, *pass.inputs, unit), keys, buffers);
  const int last = min_of(end, unit.sequence.k.length - keys.begin);
  Staircase staircase;
  for (int row = task.row_begin; row < row_end; row += panel_rows) {
    const RowPanel panel(problem, *pass.inputs, unit, row, row_end);
    const int column = row - task.row_begin;
    staircase.add(panel, keys.begin + begin, end - begin);
    panel_gradients<Operand>(pass, steps, buffers, keys, begin, end - begin, staircase, panel, rows, column);
    for (int lane = 0; lane < panel.rows; ++lane) {
      float* destination = task.dmask + panel.query[lane] * task.row_stride;
      for (int key = begin; key < last; ++key) {
        destination[(keys.begin + key) * task.key_stride] += buffers.gradients[std::int64_t{key} * row_block + column + lane];
      }
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
