// Gradient of an additive attn_mask: dS itself (the mask is added after softcap), summed over whatever the mask broadcasts
// over. A pass of its own over S and dP, taken only when that gradient is wanted: it owns its output, so sums keep one order.
#pragma once

#include "cpu/gradient_tile.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Adds dS of one row block against one key block to task.dmask. Scratch: a prepared row block, then as for backward_keys.
template <class Operand>
inline void add_mask_gradient(const BackwardPass& pass, const MaskGradientTask& task, float* scratch) {
  using Products = BackwardProducts<Operand>;
  const AttentionProblem& problem = *pass.problem;
  const Unit& unit = *task.unit;
  const KeyBlock keys = key_block_of<Operand>(pass, unit, task.block);
  const int row_end = min_of(task.row_begin + row_block<Operand>, unit.packed_rows());
  const KeyRange seen = tiles_seen<Operand>(visible_keys_of_packed_rows(unit, task.row_begin, row_end), keys);
  if (seen.begin >= seen.end) return;

  float* const own = scratch + pass.blocks.row_block_size;
  const KeyBlockBuffers<Operand> buffers(problem, keys.size, own);
  const Products products(problem, keys.size, own + KeyBlockBuffers<Operand>::size(problem, keys.size));
  const ScoreSteps steps(problem, *pass.inputs);
  [[maybe_unused]] const typename Products::Unit unit_in_use;
  prepare_rows<Operand>(pass, unit, task.row_begin, scratch);
  pack_key_rows<Operand>(pass, KeyReader(problem, *pass.inputs, unit), unit, keys, buffers);
  const int last = unit.sequence.k.length - keys.begin;
  BlockPair<Operand> pair = {{problem, scratch}, row_end - task.row_begin, keys, seen, {}};
  for (int column = 0; column < pair.row_count; column += panel_rows) {
    const RowPanel panel(problem, *pass.inputs, unit, task.row_begin + column, row_end);
    pair.staircase.add(panel, keys.begin + seen.begin, pair.keys_seen());
    panel_gradients<Operand>(
        {pass, steps, buffers, products, false}, pair, panel, column, [&](int, const GradientTile& tile, int first) {
          const int count = min_of(tile.scores.keys, last - first);
          for (int lane = 0; lane < panel.rows; ++lane) {
            float* destination = task.dmask + panel.query[lane] * task.row_stride;
            for (int key = 0; key < count; ++key) {
              destination[(keys.begin + first + key) * task.key_stride] += tile.gradients[key * tile.scores.stride + lane];
            }
          }
        });
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
