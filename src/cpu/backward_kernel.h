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

#include "cpu/gradient_tile.h"
#include "cpu/wait_until.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

inline void wait_for_turn(const std::int32_t* turn, std::int32_t mine) {
  wait_until([&] { return __atomic_load_n(turn, __ATOMIC_ACQUIRE) == mine; });
}

template <class Operand>
inline void backward_keys(const BackwardPass& pass, const BackwardTask& task, float* scratch) {
  using Products = BackwardProducts<Operand>;
  const AttentionProblem& problem = *pass.problem;
  const Unit& unit = *task.unit;
  const KeyBlock keys = key_block_of<Operand>(pass, unit, task.block);
  const KeyBlockBuffers<Operand> buffers(problem, keys.size, scratch);
  const Products products(problem, keys.size, scratch + KeyBlockBuffers<Operand>::size(problem, keys.size));
  const ScoreSteps steps(problem, *pass.inputs);
  const KeyReader reader(problem, *pass.inputs, unit);
  [[maybe_unused]] const typename Products::Unit unit_in_use;

  pack_key_rows<Operand>(pass, reader, unit, keys, buffers);
  if (task.dq) products.pack_keys(keys, problem.head_dim, buffers.k_rows);
  const std::size_t bytes_of_panel = sizeof(float) * static_cast<std::size_t>(keys.size) * dim_panel;
  std::memset(buffers.dk, 0, static_cast<std::size_t>(panels_of(problem.head_dim)) * bytes_of_panel);
  std::memset(buffers.dv, 0, static_cast<std::size_t>(panels_of(problem.head_dim_v)) * bytes_of_panel);

  const bool are_words = gradients_are_words<Operand>(problem);
  constexpr int step = row_block<Operand>;
  for (int row_begin = 0, index = 0; row_begin < unit.packed_rows(); row_begin += step, ++index) {
    const int row_count = min_of(step, unit.packed_rows() - row_begin);
    const KeyRange seen = tiles_seen<Operand>(visible_keys_of_packed_rows(unit, row_begin, row_begin + row_count), keys);
    if (seen.begin >= seen.end) continue;

    BlockPair<Operand> pair = {{problem, task.rows + index * pass.blocks.row_block_size}, row_count, keys, seen, {}};
    for (int column = 0; column < row_count; column += panel_rows) {
      const RowPanel panel(problem, *pass.inputs, unit, row_begin + column, row_begin + row_count);
      pair.staircase.add(panel, keys.begin + seen.begin, pair.keys_seen());
      panel_gradients<Operand>({pass, steps, buffers, products, are_words}, pair, panel, column,
                               [&](auto vectors, const GradientTile& tile, int key) {
                                 if (are_words) return;
                                 multiply_softcap_derivative(panel, tile);
                                 products.template keep<vectors>(tile, key, column);
                               });
    }
    if (!are_words) products.keep_all(pair);
    products.add_dv(pair, buffers.dv);
    products.add_dk(pair, buffers.dk);
    if (!task.dq) continue;
    if (task.dq_turns) wait_for_turn(task.dq_turns + index, task.block);
    products.add_dq(pair, task.dq + index * pass.blocks.dq_block_size);
    if (task.dq_turns) __atomic_store_n(task.dq_turns + index, task.block + 1, __ATOMIC_RELEASE);
  }
  write_key_gradients(pass.gradients->dk, unit, keys, problem.head_dim, problem.softmax_scale, buffers.dk);
  write_key_gradients(pass.gradients->dv, unit, keys, problem.head_dim_v, 1.0f, buffers.dv);
}

// ---- dQ of a row block to the caller's array

template <class Operand>
inline void write_query_gradients(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, const float* dq) {
  const AttentionProblem& problem = *pass.problem;
  const Tensor& tensor = pass.gradients->dq;
  const int row_end = min_of(row_begin + row_block<Operand>, unit.packed_rows());
  for (int row = row_begin; row < row_end; row += panel_rows) {
    const RowPanel panel(problem, *pass.inputs, unit, row, row_end);
    for (int v = 0; v < panel.vectors; ++v) {
      BackwardProducts<Operand>::visit_dq(dq, row - row_begin + v * lanes, problem.head_dim, [&](int lane, float* values) {
        if (v * lanes + lane >= panel.rows) return;
        scale_row(values, problem.softmax_scale, problem.head_dim);
        write_result_row(tensor, panel.offset(unit, tensor.strides, v * lanes + lane), problem.head_dim, values);
      });
    }
  }
  streams_end();
}

template <class Operand>
inline BackwardBlocks backward_blocks(const BackwardPass& pass) {
  const AttentionProblem& problem = *pass.problem;
  const std::int32_t keys = key_block_size<Operand>(problem);
  return {.keys = keys,
          .rows = row_block<Operand>,
          .row_block_size = RowBlock<Operand>::size(problem),
          .dq_block_size = std::int64_t{row_block<Operand>} * round_up(problem.head_dim, dim_panel),
          .scratch_size = KeyBlockBuffers<Operand>::size(problem, keys) + BackwardProducts<Operand>::size(problem, keys)};
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
