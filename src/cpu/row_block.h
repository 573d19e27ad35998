// A block of query rows as backward reads it: Q and dO in both layouts, lse and D. Prepared once, read by every key block.
#pragma once

#include <new>

#include "cpu/row_words.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Rows of a block: what a product over rows adds up before it touches dK and dV again.
template <class Operand>
constexpr int row_block_panels = is_matrix_operand<Operand>&& Operand::terms < 3 ? 4 : 2;
template <class Operand>
constexpr int row_block = row_block_panels<Operand>* panel_rows;

template <class Operand>
struct RowBlock {
  float* q_transposed;     // [panel][terms][dim words][width]
  float* dout_transposed;  // [panel][terms][dim_v words][width]
  float* q_panels;         // [terms][dim panels][row words][dim_panel]
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
  static std::int64_t transposed_size(int dim) { return std::int64_t{row_block<Operand>} * row_words<Operand>(dim); }
  static std::int64_t panels_size(int dim) {
    return std::int64_t{row_words<Operand>(row_block<Operand>)} * panels_of(dim) * dim_panel;
  }
};

// By its range, or by what attn_mask left of it.
inline bool sees_keys(const BackwardInputs& saved, const Unit& unit, const RowPanel& panel, int lane) {
  return panel.key_begin[lane] < panel.key_end[lane] &&
         saved.lse[panel.offset(unit, saved.lse_strides, lane)] != -__builtin_inff();
}

// A vector of the rows of a panel, as words; the lanes after the last row repeat it.
template <class Operand>
struct VectorOfRows {
  const float* rows[lanes];
  float buffers[lanes][padded_row];

  VectorOfRows(const RowPanel& panel, const Unit& unit, const ConstTensor& tensor, int first_lane, int dim) {
    for (int i = 0; i < lanes; ++i) {
      rows[i] = view_words<Operand>(tensor, panel.offset(unit, tensor.strides, first_lane + i), dim, buffers[i]);
    }
  }
};

// The rows of a block vector by vector, and the panels in whose lanes they are.
template <class Operand>
class RowVectors {
 public:
  RowVectors(const BackwardPass& pass, const Unit& unit, int row_begin, int row_end) : unit_(unit) {
    const auto add = [&](int row, int end) {
      const RowPanel& panel = *new (panels_ + known_ / panel_vectors) RowPanel(*pass.problem, *pass.inputs, unit, row, end);
      known_ += panel.vectors;
    };
    for (int row = row_begin; row < row_end; row += panel_rows) add(row, row_end);
    count_ = known_;
    if (row_end < unit.packed_rows()) add(row_end, unit.packed_rows());
  }

  int count() const { return count_; }
  const RowPanel& panel(int vector) const { return panels_[vector / panel_vectors]; }
  static int first_lane(int vector) { return vector % panel_vectors * lanes; }

  // Asks for a row of a vector, which may be the first of the next block's.
  FA_INLINE void ask(const ConstTensor& tensor, int dim, int vector, int lane) const {
    if (vector >= known_) return;
    const std::int64_t offset = panel(vector).offset(unit_, tensor.strides, first_lane(vector) + lane);
    fetch_row(element(tensor.data, tensor.dtype, offset), dim * size_of(tensor.dtype));
  }
  // For those of a unit's first vector, which nobody has asked for before.
  FA_INLINE void ask_for_first(const ConstTensor& tensor, int dim) const {
    for (int lane = 0; lane < lanes; ++lane) ask(tensor, dim, 0, lane);
  }

 private:
  const Unit& unit_;
  int count_ = 0;
  int known_ = 0;  // with the next block's first panel
  RowPanel panels_[row_block_panels<Operand> + 1];
};

// The vector's rows in panels: zeros after the panel's last row and in a row without a key, whose NaN must not leave it as
// 0 * NaN. before(lane) comes before the words of its row.
template <class Operand, class Before>
inline void pack_panels_of_rows(const BackwardInputs& saved, const RowPanel& panel, const Unit& unit, int first_lane,
                                const VectorOfRows<Operand>& vector, int dim, float* panels, std::int64_t panel_stride,
                                Before before) {
  for (int lane = 0; lane < lanes; lane += Operand::per_word, panels += dim_panel) {
    const float* rows[Operand::per_word];
    for (int i = 0; i < Operand::per_word; ++i) {
      before(lane + i);
      const int of_panel = first_lane + lane + i;
      const bool counts = of_panel < panel.rows && sees_keys(saved, unit, panel, of_panel);
      rows[i] = counts ? vector.rows[lane + i] : words_of_zeros();
    }
    for (int term = 0; term < Operand::terms; ++term) {
      float* of_term = panels + term * panels_of(dim) * panel_stride;
      for (int d = 0; d < dim; d += lanes) {
        store(of_term + d / dim_panel * panel_stride + d % dim_panel, word_of_rows<Operand>(rows, d));
      }
      for (const float*& row : rows) row += words<Operand>(dim);
    }
  }
}

// The vector's rows transposed, [terms][dim words][width]. Words that are of one row are read from `panels`: the caller's rows
// lie so far apart that they take each other's places in L1.
template <class Operand>
inline void transpose_rows(const RowPanel& panel, int first_lane, const VectorOfRows<Operand>& vector, int dim_words,
                           const float* panels, std::int64_t panel_stride, float* transposed) {
  const auto store_column = [&](int d, Vec column) { store(transposed + d * panel.width(), column); };
  if constexpr (Operand::per_word > 1) {
    visit_columns(vector.rows, dim_words, store_column);
  } else {
    for (int dim = 0; dim < dim_words; dim += dim_panel, panels += panel_stride) {
      const float* rows[lanes];
      for (int i = 0; i < lanes; ++i) rows[i] = panels + min_of(i, panel.rows - 1 - first_lane) * dim_panel;
      visit_columns(rows, min_of(dim_panel, dim_words - dim), [&](int d, Vec column) { store_column(dim + d, column); });
    }
  }
}

// lse and D of the vector's rows.
template <class Operand, class Before>
inline void prepare_statistics(const BackwardPass& pass, const Unit& unit, const RowPanel& panel, int first_lane,
                               const VectorOfRows<Operand>& dout, float* lse_log2, float* delta, Before before) {
  const BackwardInputs& saved = *pass.saved;
  const int dim = pass.problem->head_dim_v;
  for (int i = 0; i < lanes; ++i) {
    before(i);
    const int lane = first_lane + i;
    const float lse = saved.lse[panel.offset(unit, saved.lse_strides, lane)];
    // A row without keys has only masked scores: any finite lse makes their probabilities 0.
    lse_log2[i] = lse == -__builtin_inff() ? 0.0f : lse * log2_e;
    delta[i] = saved.dlse ? -saved.dlse[panel.offset(unit, saved.dlse_strides, lane)] : 0.0f;
    if (!sees_keys(saved, unit, panel, lane)) continue;
    float buffer[padded_row];
    const float* out = view_words<Operand>(saved.out, panel.offset(unit, saved.out.strides, lane), dim, buffer);
    delta[i] += dot_of_words<Operand>(dout.rows[i], out, panel_words<Operand>(dim));
  }
}

template <class Operand>
inline void prepare_rows(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, float* memory) {
  const AttentionProblem& problem = *pass.problem;
  const BackwardInputs& saved = *pass.saved;
  const RowBlock<Operand> block(problem, memory);
  const std::int64_t panel_stride = words<Operand>(row_block<Operand>) * dim_panel;
  const int row_end = min_of(row_begin + row_block<Operand>, unit.packed_rows());
  const RowVectors<Operand> vectors(pass, unit, row_begin, row_end);
  if (row_begin == 0) {
    vectors.ask_for_first(pass.inputs->q, problem.head_dim);
    vectors.ask_for_first(saved.dout, problem.head_dim_v);
    vectors.ask_for_first(saved.out, problem.head_dim_v);
  }
  for (int v = 0; v < vectors.count(); ++v) {
    const RowPanel& panel = vectors.panel(v);
    const int first_lane = vectors.first_lane(v);
    const int first = v * lanes;
    const auto pack = [&](const ConstTensor& tensor, const VectorOfRows<Operand>& vector, int dim, float* transposed,
                          float* panels) {
      panels += std::int64_t{first / Operand::per_word} * dim_panel;
      pack_panels_of_rows(saved, panel, unit, first_lane, vector, round_up(dim, dim_panel), panels, panel_stride,
                          [&](int lane) FA_INLINE_IF_FAST { vectors.ask(tensor, dim, v + 1, lane); });
      transpose_rows(panel, first_lane, vector, row_words<Operand>(dim), panels, panel_stride,
                     transposed + (first - first_lane) * std::int64_t{row_words<Operand>(dim)} + first_lane);
    };
    pack(pass.inputs->q, {panel, unit, pass.inputs->q, first_lane, problem.head_dim}, problem.head_dim, block.q_transposed,
         block.q_panels);
    const VectorOfRows<Operand> dout(panel, unit, saved.dout, first_lane, problem.head_dim_v);
    pack(saved.dout, dout, problem.head_dim_v, block.dout_transposed, block.dout_panels);
    prepare_statistics(pass, unit, panel, first_lane, dout, block.lse_log2 + first, block.delta + first,
                       [&](int lane) FA_INLINE_IF_FAST { vectors.ask(saved.out, problem.head_dim_v, v + 1, lane); });
  }
  // Zeros after the last row, as far as a product over rows reads.
  const int rows = round_up(row_end - row_begin, lanes);
  const auto clear = [&](float* panels, int dim) {
    const std::int64_t first = std::int64_t{rows / Operand::per_word} * dim_panel;
    const std::int64_t end = std::int64_t{words<Operand>(rows)} * dim_panel;
    for (int p = 0; p < Operand::terms * panels_of(dim); ++p) {
      std::memset(panels + p * panel_stride + first, 0, sizeof(float) * static_cast<std::size_t>(end - first));
    }
  };
  clear(block.q_panels, problem.head_dim);
  clear(block.dout_panels, problem.head_dim_v);
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
