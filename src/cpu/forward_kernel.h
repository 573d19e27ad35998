// Forward of a block of query rows (FlashAttention-2, algorithm 1), rows in lanes.
//
//   for each block of keys that some row sees:
//     S^T = K Q^T                          [keys][rows], log2 units
//     S   = mask(ALiBi(softcap(S)))
//     m'  = max(m, rowmax(S));  alpha = 2^(m - m')
//     P   = 2^(S - m');  l = alpha l + rowsum(P)
//     O   = alpha O + dropout(P) V         [rows][head dims]
//   O = O / l;  lse = ln 2 (m + log2 l)
#pragma once

#include "cpu/products.h"
#include "cpu/score_steps.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int task_panels = 4;            // panels of rows that share a key block while it is in cache
constexpr int overhang_keys = tile_keys;  // a score tile may compute this many keys past the end; their scores are ignored

// ---- packing: K [key block + overhang][dim words], V [dim panels][key words][dim_panel]; sizes are those of float32

inline std::int64_t packed_keys_size(const AttentionProblem& problem, std::int32_t key_block) {
  return std::int64_t{key_block + overhang_keys} * problem.head_dim;
}

inline std::int64_t packed_block_size(const AttentionProblem& problem, std::int32_t key_block) {
  return packed_keys_size(problem, key_block) + std::int64_t{key_block} * round_up(problem.head_dim_v, dim_panel);
}

template <class Operand>
inline void pack_keys_values(const ForwardPass& pass, const Unit& unit, std::int32_t block, float* packed) {
  const AttentionProblem& problem = *pass.problem;
  const KeyBlock keys = {block * pass.key_block, pass.key_block};
  pack_rows<Operand>(pass.inputs->k, unit, keys, problem.head_dim, packed);
  pack_panels<Operand>(pass.inputs->v, unit, keys, problem.head_dim_v, packed + packed_keys_size(problem, pass.key_block),
                       unchanged);
}

// ---- online softmax

// Turns S into P, updates m and l, gives alpha.
template <int N>
inline void softmax_tile(const ScoreTile& tile, float* m, float* l, float* alpha) {
  Vec maximum[N];
  Vec minus_maximum[N];
  Vec sum[N] = {};
  for (int n = 0; n < N; ++n) maximum[n] = load(m + n * lanes);
  for (int key = 0; key < tile.keys; ++key) {
    for (int n = 0; n < N; ++n) maximum[n] = larger_of(load(tile.scores + key * tile.stride + n * lanes), maximum[n]);
  }
  for (int n = 0; n < N; ++n) {
    minus_maximum[n] = -maximum[n];
    store(alpha + n * lanes, exp2_of(load(m + n * lanes) + minus_maximum[n]));
    store(m + n * lanes, maximum[n]);
  }
  for (int key = 0; key < tile.keys; ++key) {
    float* row = tile.scores + key * tile.stride;
    for (int n = 0; n < N; ++n) {
      const Vec p = exp2_of(load(row + n * lanes) + minus_maximum[n]);
      sum[n] += p;
      store(row + n * lanes, p);
    }
  }
  for (int n = 0; n < N; ++n) store(l + n * lanes, load(l + n * lanes) * load(alpha + n * lanes) + sum[n]);
}

// ---- a panel of rows

struct PanelState {
  float* q_transposed;  // [dim words][width]
  float* o;             // [width][dims]
  alignas(64) float m[panel_rows];
  alignas(64) float l[panel_rows];
};

inline void start_panel(const RowPanel& panel, const AttentionInputs& inputs, std::int64_t o_size, PanelState& state) {
  for (std::int64_t i = 0; i < o_size; ++i) state.o[i] = 0.0f;
  for (int lane = 0; lane < panel.width(); ++lane) {
    const float sink = inputs.learnable_sink ? inputs.learnable_sink[panel.head[lane]] * log2_e : -__builtin_inff();
    // A sink is a key that was seen before all others, whose value is 0.
    state.m[lane] = sink > lowest_score ? sink : lowest_score;
    state.l[lane] = sink > lowest_score ? 1.0f : 0.0f;
  }
}

struct BlockContext {
  const ForwardPass* pass;
  const float* packed;     // the block's K, then V
  std::int32_t key_begin;  // position of the block's first key
  ScoreContext scores;
  const ScoreSteps* steps;
  float* tile;  // S, then P
};

template <class Operand, int N>
inline void attend(const BlockContext& block, const RowPanel& panel, PanelState& state) {
  const AttentionProblem& problem = *block.pass->problem;
  // From a whole word on; a key before the first visible one is masked.
  const int begin = max_of(panel.some.begin - block.key_begin, 0) / Operand::per_word * Operand::per_word;
  const int end = min_of(panel.some.end - block.key_begin, block.pass->key_block);
  if (begin >= end) return;
  const int dim_words = words<Operand>(problem.head_dim);
  const ScoreTile tile = {block.tile, N * lanes, end - begin, block.key_begin + begin};
  const float* k = block.packed + std::int64_t{begin} * dim_words;
  const float* v =
      block.packed + packed_keys_size(problem, block.pass->key_block) + std::int64_t{begin / Operand::per_word} * dim_panel;
  const std::int64_t v_panel_stride = std::int64_t{words<Operand>(block.pass->key_block)} * dim_panel;
  alignas(64) float alpha[panel_rows];

  score_product<Operand, N>(k, dim_words, state.q_transposed, tile.keys, block.scores.scale.query, tile.scores, tile.stride);
  block.steps->apply(block.scores, panel, tile);
  softmax_tile<N>(tile, state.m, state.l, alpha);
  if (problem.has_dropout) {
    visit_dropout(problem, block.pass->inputs->dropout_key, panel, tile.key_begin, tile.keys, [&](int key, int n, IVec keep) {
      float* p = tile.scores + key * tile.stride + n * lanes;
      store(p, from_bits(bits_of(load(p)) & keep));
    });
  }
  const float* p = pack_along_keys<Operand>(tile.scores, tile.stride, tile.keys, tile.scores);
  value_product<Operand, N>(p, words<Operand>(tile.keys), v, v_panel_stride, panels_of(problem.head_dim_v), alpha, state.o);
}

// O / l and lse to the caller's arrays. A row that saw nothing gives 0 and -inf.
inline void finish_panel(const ForwardPass& pass, const Unit& unit, const RowPanel& panel, PanelState& state) {
  const AttentionProblem& problem = *pass.problem;
  const ForwardOutputs& outputs = *pass.outputs;
  const int dims = round_up(problem.head_dim_v, dim_panel);
  const Tensor& out = outputs.out;
  for (int lane = 0; lane < panel.rows; ++lane) {
    const float sum = state.l[lane];
    const float scale = sum == 0.0f ? 0.0f : problem.dropout_scale / sum;
    float* row = state.o + std::int64_t{lane} * dims;
    for (int d = 0; d < dims; d += lanes) store(row + d, load(row + d) * scale);
    write_row(out.dtype, element(out.data, out.dtype, panel.offset(unit, out.strides, lane)), out.strides.dim,
              problem.head_dim_v, row);
    outputs.lse[panel.offset(unit, outputs.lse_strides, lane)] =
        sum == 0.0f ? -__builtin_inff() : state.m[lane] * ln_2 + __builtin_logf(sum);
  }
}

// ---- a task

inline std::int64_t forward_scratch_size(const ForwardPass& pass) {
  const std::int64_t dim = pass.problem->head_dim;
  const std::int64_t dims_v = round_up(pass.problem->head_dim_v, dim_panel);
  const std::int64_t mask_rows = std::int64_t{lanes} * round_up(pass.key_block, lanes);
  const std::int64_t tile = std::int64_t{pass.key_block + overhang_keys} * panel_rows;
  return mask_rows + tile + task_panels * panel_rows * (dim + dims_v);
}

template <class Operand>
inline void forward_rows(const ForwardPass& pass, const ForwardTask& task, float* scratch) {
  const AttentionProblem& problem = *pass.problem;
  const AttentionInputs& inputs = *pass.inputs;
  const Unit& unit = *task.unit;
  const int dims_v = round_up(problem.head_dim_v, dim_panel);
  const ScoreSteps steps(problem, inputs);
  const ScoreScale scale(problem);

  float* next = scratch;
  const auto take = [&next](std::int64_t size) { return (next += size) - size; };
  float* mask_rows = take(std::int64_t{lanes} * round_up(pass.key_block, lanes));
  float* tile = take(std::int64_t{pass.key_block + overhang_keys} * panel_rows);

  RowPanel panels[task_panels];
  PanelState states[task_panels];
  int panel_count = 0;
  KeyRange some = {highest_int, lowest_int};
  for (int row = task.row_begin; row < task.row_end; row += panel_rows, ++panel_count) {
    RowPanel& panel = panels[panel_count];
    PanelState& state = states[panel_count];
    panel = RowPanel(problem, inputs, unit, row, task.row_end);
    state.q_transposed = take(std::int64_t{panel_rows} * problem.head_dim);
    state.o = take(std::int64_t{panel_rows} * dims_v);
    pack_transposed<Operand>(panel, unit, inputs.q, problem.head_dim, state.q_transposed);
    start_panel(panel, inputs, std::int64_t{panel.width()} * dims_v, state);
    some = {min_of(some.begin, panel.some.begin), max_of(some.end, panel.some.end)};
  }

  for (std::int32_t block = some.begin / pass.key_block; some.begin < some.end && block * pass.key_block < some.end; ++block) {
    const BlockContext context = {&pass,
                                  task.packed + block * pass.packed_block_size,
                                  block * pass.key_block,
                                  {&inputs, scale, mask_rows, round_up(pass.key_block, lanes), nullptr},
                                  &steps,
                                  tile};
    for (int i = 0; i < panel_count; ++i) {
      switch (panels[i].vectors) {
        case 1:
          attend<Operand, 1>(context, panels[i], states[i]);
          break;
        case 2:
          attend<Operand, 2>(context, panels[i], states[i]);
          break;
        default:
          attend<Operand, 3>(context, panels[i], states[i]);
          break;
      }
    }
  }
  for (int i = 0; i < panel_count; ++i) finish_panel(pass, unit, panels[i], states[i]);
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
