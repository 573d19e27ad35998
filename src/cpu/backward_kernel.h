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

// Sizes are those of float32 words.
struct RowBlock {
  float* q_transposed;     // [panel][dim words][width]
  float* dout_transposed;  // [panel][dim_v words][width]
  float* q_panels;         // [dim panels][row words][dim_panel]
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
  const RowBlock block(problem, memory);
  const std::int64_t panel_stride = words<Operand>(row_block) * dim_panel;
  const int row_end = min_of(row_begin + row_block, unit.packed_rows());
  for (int row = row_begin; row < row_end; row += panel_rows) {
    const RowPanel panel(problem, *pass.inputs, unit, row, row_end);
    const std::int64_t first = row - row_begin;
    pack_transposed<Operand>(panel, unit, q, problem.head_dim, block.q_transposed + first * problem.head_dim);
    pack_transposed<Operand>(panel, unit, saved.dout, problem.head_dim_v, block.dout_transposed + first * problem.head_dim_v);
    for (int lane = 0; lane < panel.rows; lane += Operand::per_word) {
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
  float* derivative;  // [key_block][row_block]  softcap's; then dS in words of keys
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

template <class Operand>
inline void pack_key_block(const BackwardPass& pass, const Unit& unit, KeyBlock keys, const KeyBlockBuffers& buffers) {
  const AttentionProblem& problem = *pass.problem;
  pack_rows<Operand>(pass.inputs->k, unit, keys, problem.head_dim, buffers.k_rows);
  pack_rows<Operand>(pass.inputs->v, unit, keys, problem.head_dim_v, buffers.v_rows);
  // For dQ only: a row that sees a NaN in K has NaN in dS; a row that does not must not meet it as 0 * NaN.
  pack_panels<Operand>(pass.inputs->k, unit, keys, problem.head_dim, buffers.k_panels,
                       [](Vec k) { return select(k - k == 0.0f, k, Vec{}); });
}

// S^T, dP^T, then P and dS of one panel against keys [begin, begin + count) of the block, at column `column` of the tiles.
template <class Operand, int N>
inline void panel_gradients(const BackwardPass& pass, const ScoreSteps& steps, const KeyBlockBuffers& buffers, KeyBlock keys,
                            int begin, int count, const RowPanel& panel, const RowBlock& rows, int column) {
  const AttentionProblem& problem = *pass.problem;
  const std::int64_t first = std::int64_t{begin} * row_block + column;
  const bool softcap = problem.softcap > 0;
  const GradientTile tile = {{buffers.scores + first, row_block, count, keys.begin + begin},
                             buffers.gradients + first,
                             softcap ? buffers.derivative + first : nullptr};
  const ScoreContext context = {pass.inputs, ScoreScale(problem), buffers.mask_rows, keys.size, tile.softcap_derivative};
  const int dim_words = words<Operand>(problem.head_dim);
  const int dim_v_words = words<Operand>(problem.head_dim_v);
  score_product<Operand, N>(buffers.k_rows + std::int64_t{begin} * dim_words, dim_words,
                            rows.q_transposed + std::int64_t{column} * problem.head_dim, count, context.scale.query,
                            tile.scores.scores, row_block);
  score_product<Operand, N>(buffers.v_rows + std::int64_t{begin} * dim_v_words, dim_v_words,
                            rows.dout_transposed + std::int64_t{column} * problem.head_dim_v, count, 1.0f, tile.gradients,
                            row_block);
  steps.apply(context, panel, tile.scores);
  gradient_tile(pass, panel, rows.lse_log2 + column, rows.delta + column, tile);
}

template <class Operand>
inline void panel_gradients(const BackwardPass& pass, const ScoreSteps& steps, const KeyBlockBuffers& buffers, KeyBlock keys,
                            int begin, int count, const RowPanel& panel, const RowBlock& rows, int column) {
  switch (panel.vectors) {
    case 1:
      return panel_gradients<Operand, 1>(pass, steps, buffers, keys, begin, count, panel, rows, column);
    case 2:
      return panel_gradients<Operand, 2>(pass, steps, buffers, keys, begin, count, panel, rows, column);
    default:
      return panel_gradients<Operand, 3>(pass, steps, buffers, keys, begin, count, panel, rows, column);
  }
}

// A tile [keys][row_block] as a left operand: words of neighbouring rows, in place, for products over rows.
template <class Operand>
inline void pack_along_rows(float* tile, int keys, int rows) {
  if constexpr (Operand::per_word > 1) {
    for (int key = 0; key < keys; ++key) pack_row<Operand>(tile + key * row_block, rows, tile + key * row_block);
  }
}

// Words of neighbouring keys, [key words][row_block], for the product over keys. float32 needs no other form.
template <class Operand>
inline const float* pack_along_keys(const float* tile, int keys, float* packed) {
  if constexpr (Operand::per_word == 1) {
    return tile;
  } else {
    for (int word = 0; word < keys / Operand::per_word; ++word) {
      for (int column = 0; column < row_block; column += lanes) {
        Vec neighbours[Operand::per_word];
        for (int i = 0; i < Operand::per_word; ++i) {
          neighbours[i] = load(tile + (word * Operand::per_word + i) * row_block + column);
        }
        store(packed + word * row_block + column, Operand::word(neighbours));
      }
    }
    return packed;
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
  float row[padded_head_dim];
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
    const KeyRange seen = visible_keys_of_packed_rows(unit, row_begin, row_begin + row_count);
    const int begin = max_of(seen.begin - keys.begin, 0) / tile_keys * tile_keys;
    const int end = min_of(round_up(seen.end - keys.begin, tile_keys), keys.size);
    if (seen.begin >= seen.end || begin >= end) continue;
    const int count = end - begin;
    const std::int64_t first = std::int64_t{begin} * row_block;

    const RowBlock rows(problem, task.rows + index * pass.row_block_size);
    for (int column = 0; column < row_count; column += panel_rows) {
      const RowPanel panel(problem, *pass.inputs, unit, row_begin + column, row_begin + row_count);
      panel_gradients<Operand>(pass, steps, buffers, keys, begin, count, panel, rows, column);
      if (problem.softcap > 0) {
        multiply_softcap_derivative(panel, {{buffers.scores + first + column, row_block, count, 0},
                                            buffers.gradients + first + column,
                                            buffers.derivative + first + column});
      }
    }

    float* p = buffers.scores + first;
    float* ds = buffers.gradients + first;
    const float* ds_by_keys = pack_along_keys<Operand>(ds, count, buffers.derivative);
    pack_along_rows<Operand>(p, count, row_count);
    pack_along_rows<Operand>(ds, count, row_count);
    const int row_words = words<Operand>(row_count);
    panel_product<Operand, M>(p, row_block, 1, rows.dout_panels, row_stride, row_words, count, v_panels,
                              buffers.dv + std::int64_t{begin} * dim_panel, gradient_stride);
    panel_product<Operand, M>(ds, row_block, 1, rows.q_panels, row_stride, row_words, count, k_panels,
                              buffers.dk + std::int64_t{begin} * dim_panel, gradient_stride);
    if (!task.dq) continue;
    if (task.dq_turns) wait_for_turn(task.dq_turns + index, task.block);
    panel_product<Operand, M>(ds_by_keys, 1, row_block, buffers.k_panels + std::int64_t{begin / Operand::per_word} * dim_panel,
                              key_stride, count / Operand::per_word, round_up(row_count, M), k_panels,
                              task.dq + index * pass.dq_block_size, row_block * dim_panel);
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
