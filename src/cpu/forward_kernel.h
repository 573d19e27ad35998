// Forward of a block of query rows (FlashAttention-2, algorithm 1), rows in lanes.
//
//   for each block of keys that some row sees:
//     S^T = K Q^T                          [keys][rows], log2 units
//     S   = mask(ALiBi(softcap(S)))
//     where rowmax(S) is far above m:  l, O *= 2^(m - rowmax(S));  m = rowmax(S)
//     P   = 2^(S - m);  l += rowsum(P)
//     O  += dropout(P) V                   [rows][head dims]
//   O = O / l;  lse = ln 2 (m + log2 l)
#pragma once

#include <new>

#include "cpu/forward_blocks.h"
#include "cpu/forward_scores.h"
#include "cpu/matrix_scores.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int task_panels = 4;  // panels of rows that share a key block while it is in cache

// ---- a panel of rows

struct PanelState {
  int first_row;        // of the unit's
  float* q_transposed;  // [dim words][width]
  float* o;             // [width][dims], or as ForwardProducts gathers it
  SoftmaxState softmax;
  bool is_empty;     // no key was added yet
  bool is_finished;  // the result is written
};

template <class Operand>
struct BlockContext {
  const ForwardPass* pass;
  const ForwardTask* task;
  BlockParts parts;
  std::int32_t key_begin;  // position of the block's first key
  ScoreContext scores;
  const ScoreSteps* steps;
  float* tile;        // S, then P
  float* words_of_p;  // where ForwardProducts wants P in a place of its own
  PackAhead<Operand>* ahead;
};

template <class Operand, int N>
inline void attend(const BlockContext<Operand>& block, const RowPanel& panel, PanelState& state) {
  const AttentionProblem& problem = *block.pass->problem;
  // From a whole word or tile on; a key before the first visible one is masked.
  const int begin = max_of(panel.some.begin - block.key_begin, 0) / depth_granule<Operand> * depth_granule<Operand>;
  const int end = min_of(panel.some.end - block.key_begin, block.pass->key_block);
  if (begin >= end) return;
  const int dim_words = row_words<Operand>(problem.scored_dims());
  const ScoreTile tile = {block.tile, N * lanes, end - begin, block.key_begin + begin};
  const float* k = block.parts.k + std::int64_t{begin} * dim_words;

  using Products = ForwardProducts<Operand>;
  Staircase staircase;
  staircase.add(panel, tile.key_begin, tile.keys);
  block.ahead->add_mask(block.scores.inputs->attn_mask, *block.task->unit, panel, {tile.key_begin, tile.key_begin + tile.keys});
  const SummedRows rows = {state.is_empty ? nullptr : state.o, round_up(problem.head_dim_v, dim_panel),
                           round_up(problem.head_dim_v, lanes)};
  BlockScores<Operand, N> scores(*block.steps, block.scores, panel, staircase, tile, state.softmax, rows, block.words_of_p);
  const auto& p = scores.compute(k, dim_words, state.q_transposed, *block.ahead);
  const auto add_values = [&](const ResultRows* results) {
    Products::template values<N>(p, {begin, end}, block.parts.v, words<Operand>(block.pass->key_block), problem.head_dim_v,
                                 staircase, {state.o, state.is_empty, results}, *block.ahead);
  };
  const ForwardTask& task = *block.task;
  const ForwardOutputs& outputs = *block.pass->outputs;
  const bool is_last = min_of(panel.some.end, task.keys.end) <= block.key_begin + block.pass->key_block;
  if (Products::leaves_results && is_last && ResultRows::suit(problem, outputs.out, task.partial)) {
    const ResultRows results(problem, outputs, *task.unit, panel, state.softmax, state.first_row, task.partial);
    add_values(&results);
    state.is_finished = true;
  } else {
    add_values(nullptr);
  }
  state.is_empty = false;
}

// ---- a task

// Q^T of a panel, whose first row is the task's row `first`.
template <class Operand>
inline void pack_queries(const ForwardPass& pass, const ForwardTask& task, const RowPanel& panel, int first, float* packed) {
  const AttentionProblem& problem = *pass.problem;
  const AttentionInputs& inputs = *pass.inputs;
  const int dim_words = row_words<Operand>(problem.scored_dims());
  const PackedRows* copies = task.queries;
  if (copies && copies->unit == task.unit && copies->row_begin == task.row_begin) {
    return pack_transposed(panel, dim_words, packed, [&](int lane, float*) {
      return copies->floats + (first + min_of(lane, panel.rows - 1)) * std::int64_t{dim_words};
    });
  }
  fetch_rows(inputs.q, *task.unit, panel, problem.head_dim);
  pack_transposed(panel, dim_words, packed, [&](int lane, float* row) {
    return view_query_words<Operand>(inputs, problem, *task.unit, panel, lane, row);
  });
}

inline std::int64_t forward_scratch_size(const ForwardPass& pass) {
  const std::int64_t dim = row_floats(pass.problem->scored_dims());
  const std::int64_t dims_v = round_up(pass.problem->head_dim_v, dim_panel);
  const std::int64_t mask_rows = std::int64_t{lanes} * round_up(pass.key_block, lanes);
  const std::int64_t tile = std::int64_t{pass.key_block + most_keys_past_end} * panel_rows;
  return mask_rows + tile + row_floats(static_cast<int>(tile)) + task_panels * panel_rows * (dim + dims_v) +
         TaskBlocks<Float32Operand>::own_size(pass);
}

template <class Operand>
inline void forward_rows(const ForwardPass& pass, const ForwardTask& task, float* scratch) {
  const AttentionProblem& problem = *pass.problem;
  const AttentionInputs& inputs = *pass.inputs;
  const Unit& unit = *task.unit;
  const int dims_v = round_up(problem.head_dim_v, dim_panel);
  const ScoreSteps steps(problem, inputs);
  const ScoreScale scale(problem);
  [[maybe_unused]] const typename ForwardProducts<Operand>::Unit unit_in_use;

  float* next = scratch;
  const auto take = [&next](std::int64_t size) { return (next += size) - size; };
  float* mask_rows = take(std::int64_t{lanes} * round_up(pass.key_block, lanes));
  float* tile = take(std::int64_t{pass.key_block + most_keys_past_end} * panel_rows);
  float* words_of_p = take(row_floats((pass.key_block + most_keys_past_end) * panel_rows));

  RowPanel panels[task_panels];
  PanelState states[task_panels];
  int panel_count = 0;
  KeyRange some = {highest_int, lowest_int};
  for (int row = task.row_begin; row < task.row_end; row += panel_rows, ++panel_count) {
    const RowPanel& panel = *new (panels + panel_count) RowPanel(problem, inputs, unit, row, task.row_end);
    PanelState& state = states[panel_count];
    state.q_transposed = take(std::int64_t{panel_rows} * row_floats(problem.scored_dims()));
    state.o = take(std::int64_t{panel_rows} * dims_v);
    pack_queries<Operand>(pass, task, panel, row - task.row_begin, state.q_transposed);
    start_softmax(panel, task.is_first ? inputs.learnable_sink : nullptr, state.softmax);
    state.first_row = row;
    state.is_empty = true;
    state.is_finished = false;
    some = {min_of(some.begin, panel.some.begin), max_of(some.end, panel.some.end)};
  }

  PackAhead<Operand> ahead;
  const auto& next_rows = task.next.rows;
  const bool copies_rows =
      next_rows.unit && ahead.add_rows(problem, inputs, *next_rows.unit, next_rows.range, next_rows.packed->floats);
  some = {max_of(some.begin, task.keys.begin), min_of(some.end, task.keys.end)};
  TaskBlocks<Operand> blocks(pass, task, some, take(TaskBlocks<Operand>::own_size(pass)), ahead);
  for (std::int32_t block = blocks.begin(); block < blocks.end(); ++block) {
    const BlockParts parts = blocks.enter(block);
    const BlockContext<Operand> context = {
        &pass,
        &task,
        parts,
        block * pass.key_block,
        {&problem, &inputs, &unit, scale, mask_rows, round_up(pass.key_block, lanes), nullptr},
        &steps,
        tile,
        words_of_p,
        &ahead};
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
    blocks.leave();
  }
  streams_end();
  if (copies_rows) {
    ahead.finish_rows();
    next_rows.packed->unit = next_rows.unit;
    next_rows.packed->row_begin = next_rows.range.begin;
  }
  for (int i = 0; i < panel_count; ++i) {
    const PanelState& state = states[i];
    if (state.is_finished) continue;
    if (state.is_empty) std::memset(state.o, 0, sizeof(float) * static_cast<std::size_t>(panels[i].width() * dims_v));
    finish_panel(problem, *pass.outputs, unit, panels[i], state.softmax, state.first_row, task.partial,
                 [&](const auto& visit) { ForwardProducts<Operand>::visit_rows(state.o, dims_v, panels[i], visit); });
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
