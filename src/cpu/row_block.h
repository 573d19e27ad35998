// A block of query rows as backward reads it: Q and dO in both layouts, lse and D. Prepared once, read by every key block.
#pragma once

#include "cpu/pack.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Rows of a block: what a product over rows adds up before it touches dK and dV again.
template <class Operand>
constexpr int row_block = (Operand::word_granule == 1 ? 2 : 4) * panel_rows;

template <class Operand>
struct RowBlock {
  float* q_transposed;     // [panel][dim words][width]
  float* dout_transposed;  // [panel][dim_v words][width]
  float* q_panels;         // [dim panels][row words][dim_panel]
  float* dout_panels;
  float* lse_log2;  // [row_block]
  float* delta;     // [row_block]  D

  static std::int64_t size(const AttentionProblem& problem) {
    return transposed_size(problem.head_dim) + transposed_size(problem.head_dim_v) + panels_size(problem.head_dim) +
           panels_size(problem.head_dim_v) + 2 * row_block<Operand>;
  }

  RowBlock(const AttentionProblem& problem, float* memory) {
    const auto take = [&memory](std::int64_t size) { return (memory += size) - size; };
    q_panels = take(panels_size(problem.head_dim));
    dout_panels = take(panels_size(problem.head_dim_v));
    lse_log2 = take(row_block<Operand>);
    delta = take(row_block<Operand>);
    q_transposed = take(transposed_size(problem.head_dim));
    dout_transposed = take(transposed_size(problem.head_dim_v));
  }

 private:
  static std::int64_t transposed_size(int dim) { return std::int64_t{row_block<Operand>} * words<Operand>(dim); }
  static std::int64_t panels_size(int dim) {
    return std::int64_t{words<Operand>(row_block<Operand>)} * panels_of(dim) * dim_panel;
  }
};

// By its range, or by what attn_mask left of it.
inline bool sees_keys(const BackwardInputs& saved, const Unit& unit, const RowPanel& panel, int lane) {
  return panel.key_begin[lane] < panel.key_end[lane] &&
         saved.lse[panel.offset(unit, saved.lse_strides, lane)] != -__builtin_inff();
}

// The panel's rows from `lane` on that make one word: zeros after the last row and in a row without a key, whose NaN must not
// leave it as 0 * NaN.
template <class Operand>
struct WordOfRows {
  const float* rows[Operand::per_word];
  float buffers[Operand::per_word][padded_head_dim];

  WordOfRows(const BackwardInputs& saved, const RowPanel& panel, const Unit& unit, const ConstTensor& tensor, int lane,
             int dim) {
    for (int i = 0; i < Operand::per_word; ++i) {
      rows[i] = buffers[i];
      if (lane + i < panel.rows && sees_keys(saved, unit, panel, lane + i)) {
        rows[i] = view_row(tensor, panel.offset(unit, tensor.strides, lane + i), dim, buffers[i]);
      } else {
        std::memset(buffers[i], 0, sizeof(float) * static_cast<std::size_t>(round_up(dim, dim_panel)));
      }
    }
  }
};

inline float dot(const float* a, const float* b, int padded_dim) {
  Vec sum = {};
  for (int d = 0; d < padded_dim; d += lanes) sum += load(a + d) * load(b + d);
  float total = 0.0f;
  for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
  return total;
}

// lse and D of the rows of a word, the first of which is `lane` of the panel.
template <class Operand>
inline void prepare_statistics(const BackwardPass& pass, const Unit& unit, const RowPanel& panel, int lane,
                               const WordOfRows<Operand>& dout, float* lse_log2, float* delta) {
  const BackwardInputs& saved = *pass.saved;
  const int dim = pass.problem->head_dim_v;
  const WordOfRows<Operand> out(saved, panel, unit, saved.out, lane, dim);
  for (int i = 0; i < Operand::per_word && lane + i < panel.rows; ++i) {
    const float lse = saved.lse[panel.offset(unit, saved.lse_strides, lane + i)];
    // A row without keys has only masked scores: any finite lse makes their probabilities 0.
    lse_log2[lane + i] = lse == -__builtin_inff() ? 0.0f : lse * log2_e;
    delta[lane + i] = dot(dout.rows[i], out.rows[i], round_up(dim, dim_panel)) -
                      (saved.dlse ? saved.dlse[panel.offset(unit, saved.dlse_strides, lane + i)] : 0.0f);
  }
}

template <class Operand>
inline void prepare_rows(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, float* memory) {
  const AttentionProblem& problem = *pass.problem;
  const BackwardInputs& saved = *pass.saved;
  const ConstTensor& q = pass.inputs->q;
  const RowBlock<Operand> block(problem, memory);
  const std::int64_t panel_stride = words<Operand>(row_block<Operand>) * dim_panel;
  const int row_end = min_of(row_begin + row_block<Operand>, unit.packed_rows());
  for (int row = row_begin; row < row_end; row += panel_rows) {
    const RowPanel panel(problem, *pass.inputs, unit, row, row_end);
    const std::int64_t first = row - row_begin;
    pack_transposed<Operand>(panel, unit, q, problem.head_dim, block.q_transposed + first * words<Operand>(problem.head_dim));
    pack_transposed<Operand>(panel, unit, saved.dout, problem.head_dim_v,
                             block.dout_transposed + first * words<Operand>(problem.head_dim_v));
    // Zeros after the last row, as far as a product reads.
    const bool is_last = row + panel_rows >= row_end;
    const int lane_end = is_last ? round_up(row_end - row_begin, depth_granule<Operand>) - static_cast<int>(first) : panel.rows;
    for (int lane = 0; lane < lane_end; lane += Operand::per_word) {
      const std::int64_t word = (first + lane) / Operand::per_word * dim_panel;
      const WordOfRows<Operand> q_rows(saved, panel, unit, q, lane, problem.head_dim);
      const WordOfRows<Operand> dout_rows(saved, panel, unit, saved.dout, lane, problem.head_dim_v);
      scatter_to_panels<Operand>(q_rows.rows, problem.head_dim, block.q_panels + word, panel_stride, unchanged);
      scatter_to_panels<Operand>(dout_rows.rows, problem.head_dim_v, block.dout_panels + word, panel_stride, unchanged);
      prepare_statistics<Operand>(pass, unit, panel, lane, dout_rows, block.lse_log2 + first, block.delta + first);
    }
    // The lanes that repeat the last row repeat its statistics, so that they stay finite if it does.
    for (int lane = panel.rows; lane < panel.width(); ++lane) {
      block.lse_log2[first + lane] = block.lse_log2[first + panel.rows - 1];
      block.delta[first + lane] = block.delta[first + panel.rows - 1];
    }
  }
}

// A sink is a key whose value is 0: d sink = -P_sink D. Adds each row of the block to its head, in order.
template <class Operand>
inline void add_sink_gradient(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, const float* memory,
                              double* dsink) {
  const RowBlock<Operand> block(*pass.problem, const_cast<float*>(memory));
  const int rows = min_of(row_block<Operand>, unit.packed_rows() - row_begin);
  for (int row = 0; row < rows; ++row) {
    const int head = unit.first_head + (row_begin + row) % unit.group;
    const float p = __builtin_exp2f(pass.inputs->learnable_sink[head] * log2_e - block.lse_log2[row]);
    if (p != 0.0f) dsink[head] -= static_cast<double>(p) * block.delta[row];
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
