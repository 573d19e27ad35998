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

#include "cpu/forward_scores.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// The most keys of a score tile. Key blocks are a multiple of this, and so many keys past the end may be computed, whose scores
// are ignored.
constexpr int forward_key_tile = FA_BFLOAT16_TILES ? 2 * matrix_tile : score_keys<1>;

// ---- packing: K [key block + overhang][dim words], V [dim panels][key words][dim_panel]; sizes are those of float32

inline std::int64_t packed_keys_size(const AttentionProblem& problem, std::int32_t key_block) {
  return std::int64_t{key_block + forward_key_tile} * row_floats(problem.scored_dims());
}

inline std::int64_t packed_block_size(const AttentionProblem& problem, std::int32_t key_block) {
  return packed_keys_size(problem, key_block) + std::int64_t{key_block} * round_up(problem.head_dim_v, dim_panel);
}

// K, or K and V with qv; bfloat16 pairs lie in K as they do in its words.
template <class Operand>
inline void pack_scored_rows(const AttentionProblem& problem, const KeyReader& reader, KeyBlock keys, float* packed) {
  const int dim = problem.scored_dims();
  float buffer[padded_head_dim];
  for (int i = 0; i < keys.size; ++i, packed += words<Operand>(dim)) {
    reader.fetch_scored_ahead(keys.begin + i);
    if (const char* pairs = reader.template words_of_key<Operand>(keys.begin + i)) {
      const int used = dim / 2;
      std::memcpy(packed, pairs, static_cast<std::size_t>(used) * sizeof(float));
      std::memset(packed + used, 0, static_cast<std::size_t>(words<Operand>(dim) - used) * sizeof(float));
    } else {
      pack_row<Operand>(reader.view_scored(keys.begin + i, buffer), dim, packed);
    }
  }
}

template <class Operand>
inline void pack_keys_values(const ForwardPass& pass, const Unit& unit, std::int32_t block, float* packed) {
  const AttentionProblem& problem = *pass.problem;
  const KeyBlock keys = {block * pass.key_block, pass.key_block};
  const KeyReader reader(problem, *pass.inputs, unit);
  pack_scored_rows<Operand>(problem, reader, keys, packed);
  pack_value_panels<Operand>(reader, values_of(problem, *pass.inputs), unit, keys,
                             packed + packed_keys_size(problem, pass.key_block));
}

// The floats of blocks[0], which is the unit's block `index`, packed by whoever gets to it first. While another thread is at
// work on it, those of blocks up to `end` are packed.
template <class Operand>
inline const float* packed_block(const ForwardPass& pass, const Unit& unit, std::int32_t index, std::int32_t end,
                                 PackedBlock* blocks) {
  for (std::int32_t i = 0; index + i < end && state_of(blocks[0]) != PackedBlock::filled; ++i) {
    if (!begin_filling(blocks[i])) continue;
    pack_keys_values<Operand>(pass, unit, index + i, blocks[i].floats);
    end_filling(blocks[i]);
  }
  wait_until_filled(blocks[0]);
  return blocks[0].floats;
}

// Begins to fill the block that comes next. Null: there is nothing to end.
template <class Operand>
inline PackedBlock* begin_next_block(const ForwardPass& pass, const Unit& unit, std::int32_t index, PackedBlock& block,
                                     PackAhead<Operand>& ahead) {
  const AttentionProblem& problem = *pass.problem;
  const KeyBlock keys = {index * pass.key_block, pass.key_block};
  if (state_of(block) != PackedBlock::empty) return nullptr;
  if (!PackAhead<Operand>::can_copy(problem, *pass.inputs, unit, keys)) {
    ahead.ask_for_block(problem, *pass.inputs, unit, keys);
    return nullptr;
  }
  if (!begin_filling(block)) return nullptr;
  ahead.copy_block(problem, *pass.inputs, unit, keys, {block.floats, block.floats + packed_keys_size(problem, pass.key_block)});
  return &block;
}

// ---- a panel of rows

struct PanelState {
  int first_row;        // of the unit's
  float* q_transposed;  // [dim words][width]
  float* o;             // [width][dims]
  SoftmaxState softmax;
  bool is_empty;     // no key was added yet
  bool is_finished;  // the result is written
};

template <class Operand>
struct BlockContext {
  const ForwardPass* pass;
  const ForwardTask* task;
  const float* packed;     // the block's K, then V
  std::int32_t key_begin;  // position of the block's first key
  ScoreContext scores;
  const ScoreSteps* steps;
  float* tile;             // S, then P
  float* transposed_tile;  // of the same size
  PackAhead<Operand>* ahead;
};

template <class Operand, int N>
inline void attend(const BlockContext<Operand>& block, const RowPanel& panel, PanelState& state) {
  const AttentionProblem& problem = *block.pass->problem;
  // From a whole word or tile on; a key before the first visible one is masked.
  const int begin = max_of(panel.some.begin - block.key_begin, 0) / depth_granule<Operand> * depth_granule<Operand>;
  const int end = min_of(panel.some.end - block.key_begin, block.pass->key_block);
  if (begin >= end) return;
  const int dim_words = words<Operand>(problem.scored_dims());
  const ScoreTile tile = {block.tile, N * lanes, end - begin, block.key_begin + begin};
  const float* k = block.packed + std::int64_t{begin} * dim_words;
  const float* v =
      block.packed + packed_keys_size(problem, block.pass->key_block) + std::int64_t{begin / Operand::per_word} * dim_panel;
  const std::int64_t v_panel_stride = std::int64_t{words<Operand>(block.pass->key_block)} * dim_panel;

  using Products = ForwardProducts<Operand>;
  Staircase staircase;
  staircase.add(panel, tile.key_begin, tile.keys);
  block.ahead->add_mask(block.scores.inputs->attn_mask, *block.task->unit, panel, {tile.key_begin, tile.key_begin + tile.keys});
  const SummedRows rows = {state.is_empty ? nullptr : state.o, round_up(problem.head_dim_v, dim_panel)};
  BlockScores<Operand, N>(*block.steps, block.scores, panel, staircase, tile, state.softmax, rows)
      .compute(k, dim_words, state.q_transposed, *block.ahead);
  if (problem.has_dropout) drop_probabilities(problem, *block.pass->inputs, panel, tile);
  const auto add_values = [&](const ResultRows* results) {
    Products::template values<N>(tile.scores, tile.keys, v, v_panel_stride, panels_of(problem.head_dim_v), staircase,
                                 {state.o, state.is_empty, results}, block.transposed_tile, *block.ahead);
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
  const int dim_words = words<Operand>(problem.scored_dims());
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
  const std::int64_t tile = std::int64_t{pass.key_block + forward_key_tile} * panel_rows;
  return mask_rows + 2 * tile + task_panels * panel_rows * (dim + dims_v) + 2 * pass.packed_block_size;
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
  float* tile = take(std::int64_t{pass.key_block + forward_key_tile} * panel_rows);
  float* transposed_tile = take(std::int64_t{pass.key_block + forward_key_tile} * panel_rows);

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
  const std::int32_t block_begin = some.begin < some.end ? some.begin / pass.key_block : 0;
  const std::int32_t block_end = some.begin < some.end ? (some.end - 1) / pass.key_block + 1 : 0;
  PackedBlock own_blocks[2] = {{take(pass.packed_block_size)}, {take(pass.packed_block_size)}};
  const auto place_of = [&](std::int32_t block) { return task.blocks ? task.blocks + block : own_blocks + block % 2; };
  for (std::int32_t block = block_begin; block < block_end; ++block) {
    const float* packed = packed_block<Operand>(pass, unit, block, task.blocks ? block_end : block + 1, place_of(block));
    PackedBlock* filling = nullptr;
    if (block + 1 < block_end) {
      if (!task.blocks) place_of(block + 1)->state = PackedBlock::empty;  // the block before is done with
      filling = begin_next_block<Operand>(pass, unit, block + 1, *place_of(block + 1), ahead);
    } else if (const auto& after = task.next.block; after.unit) {
      filling = begin_next_block<Operand>(pass, *after.unit, after.index, *after.packed, ahead);
    }
    const BlockContext<Operand> context = {
        &pass,
        &task,
        packed,
        block * pass.key_block,
        {&problem, &inputs, &unit, scale, mask_rows, round_up(pass.key_block, lanes), nullptr},
        &steps,
        tile,
        transposed_tile,
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
    if (filling) {
      ahead.finish_block();
      end_filling(*filling);
    }
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
    finish_panel(problem, *pass.outputs, unit, panels[i], state.softmax, state.first_row, state.o, dims_v, task.partial);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
