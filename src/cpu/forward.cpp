// The forward pass: memory, threads and order. Arithmetic is in forward_kernel.h.

#include <algorithm>
#include <iterator>
#include <limits>
#include <vector>

#include "cpu/attention.h"
#include "cpu/buffer.h"
#include "cpu/decode.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/key_runs.h"
#include "cpu/parallel.h"
#include "cpu/sequences.h"

namespace flash_attn::cpu {
namespace {

// Query panels that share a task: enough to reuse a key block from L2, few enough to balance the threads.
constexpr std::int32_t panels_per_task = 4;

// Packed K and V held at a time, when a call has more than one unit to a thread.
constexpr std::int64_t packed_limit = std::int64_t{64} << 20;  // floats: 256 MiB

// Keys a block: K and V of a block stay in L2 beside the accumulators.
std::int32_t forward_key_block(const Kernels& level, const AttentionProblem& problem) {
  const std::int32_t about = std::max(problem.scored_dims(), problem.head_dim_v) <= 160 ? 128 : 80;
  return about / level.forward_key_tile * level.forward_key_tile;
}

void clear_unused_rows(const AttentionProblem& problem, const std::vector<Sequence>& sequences, const ForwardOutputs& outputs) {
  for_each_unused_row(problem, sequences, Side::q, [&](std::int64_t batch, std::int64_t row) {
    zero_row(outputs.out, batch, row, problem.heads_q, problem.head_dim_v);
    for (std::int64_t head = 0; head < problem.heads_q; ++head) {
      outputs.lse[batch * outputs.lse_strides.batch + head * outputs.lse_strides.head + row * outputs.lse_strides.seq] =
          -std::numeric_limits<float>::infinity();
    }
  });
}

struct PackedUnit {
  const Unit* unit;
  std::int64_t first_block;  // where its blocks start in the buffer
};

struct RowTask {
  std::size_t packed_unit;
  std::int32_t row_begin;
  std::int32_t row_end;
  std::int64_t cost;  // keys to visit, for the order only
};

std::int32_t rows_of_task(const Kernels& level) { return panels_per_task * level.panel_rows; }

// Units [begin, end): packs their K and V once, then runs their row blocks.
void forward_units(const Kernels& level, const ForwardPass& pass, int threads, const Unit* begin, const Unit* end) {
  std::vector<PackedUnit> packed_units;
  std::int64_t blocks = 0;
  for (const Unit* unit = begin; unit != end; ++unit) {
    packed_units.push_back({unit, blocks});
    blocks += (unit->sequence.k.length + pass.key_block - 1) / pass.key_block;
  }
  const Buffer packed = allocate(blocks * pass.packed_block_size);

  struct BlockTask {
    const Unit* unit;
    std::int32_t block;
    float* destination;
  };
  std::vector<BlockTask> block_tasks;
  const std::int32_t rows_per_task = rows_of_task(level);
  std::vector<RowTask> row_tasks;
  for (std::size_t i = 0; i < packed_units.size(); ++i) {
    const Unit& unit = *packed_units[i].unit;
    const KeyRange seen = visible_keys_of_rows(unit.rule, 0, unit.rule.seqlen_q);
    for (std::int32_t block = seen.begin / pass.key_block; block * pass.key_block < seen.end; ++block) {
      block_tasks.push_back({&unit, block, packed.get() + (packed_units[i].first_block + block) * pass.packed_block_size});
    }
    for (std::int32_t row = 0; row < unit.packed_rows(); row += rows_per_task) {
      const std::int32_t row_end = std::min(row + rows_per_task, unit.packed_rows());
      const KeyRange keys = visible_keys_of_packed_rows(unit, row, row_end);
      row_tasks.push_back({i, row, row_end, std::int64_t{keys.end - keys.begin} * (row_end - row)});
    }
  }
  parallel_for(static_cast<std::int64_t>(block_tasks.size()), threads, [&](std::int64_t i, int) {
    const BlockTask& task = block_tasks[static_cast<std::size_t>(i)];
    level.pack_keys_values(pass, *task.unit, task.block, task.destination);
  });

  // Unit after unit, so that the threads share one head's keys in cache; the heaviest rows of a unit first, so that it ends
  // even.
  std::stable_sort(row_tasks.begin(), row_tasks.end(), [](const RowTask& a, const RowTask& b) {
    return a.packed_unit != b.packed_unit ? a.packed_unit < b.packed_unit : a.cost > b.cost;
  });
  const std::int64_t scratch_size = (level.forward_scratch_size(pass) + 15) / 16 * 16;
  const Buffer scratch = allocate(scratch_size * threads);
  parallel_for(static_cast<std::int64_t>(row_tasks.size()), threads, [&](std::int64_t i, int slot) {
    const RowTask& task = row_tasks[static_cast<std::size_t>(i)];
    const PackedUnit& unit = packed_units[task.packed_unit];
    const float* blocks_of_unit = packed.get() + unit.first_block * pass.packed_block_size;
    const KeyRange all_keys = {0, unit.unit->sequence.k.length};
    level.forward_rows(pass, {unit.unit, blocks_of_unit, task.row_begin, task.row_end, all_keys, true, {nullptr, nullptr}},
                       scratch.get() + slot * scratch_size);
  });
}

// Units whose rows are one task: it packs the keys it reads itself, in cache, since no other reads them. Runs of keys feed the
// threads instead.
void forward_short_units(const Kernels& level, const ForwardPass& pass, int threads, const std::vector<Unit>& units) {
  if (units.empty()) return;
  const KeyRuns runs(level, *pass.problem, units, pass.key_block);
  const std::int64_t scratch_size = (level.forward_scratch_size(pass) + 15) / 16 * 16;
  const Buffer scratch = allocate(scratch_size * threads);
  parallel_for(static_cast<std::int64_t>(runs.runs().size()), threads, [&](std::int64_t i, int slot) {
    const KeyRun& run = runs.runs()[static_cast<std::size_t>(i)];
    level.forward_rows(pass, {run.unit, nullptr, 0, run.unit->packed_rows(), run.keys, run.is_first, run.partial},
                       scratch.get() + slot * scratch_size);
  });
  runs.combine({pass.problem, pass.inputs, pass.outputs}, threads);
}

}  // namespace

void forward(const AttentionProblem& problem, const AttentionInputs& inputs, const ForwardOutputs& outputs) {
  const Kernels& level = kernels();
  const std::vector<Sequence> sequences = sequences_of(problem, inputs);
  const auto is_short = [&](const Unit& unit) { return unit.packed_rows() <= rows_of_task(level); };
  std::vector<Unit> units = units_of(problem, sequences);
  std::erase_if(units, [&](const Unit& unit) { return suits_decode(problem, inputs, unit.sequence); });
  const std::int32_t key_block = forward_key_block(level, problem);
  const ForwardPass pass = {&problem, &inputs, &outputs, key_block, level.packed_block_size(problem, key_block)};
  const int threads = thread_count();
  clear_unused_rows(problem, sequences, outputs);
  decode_sequences(level, {&problem, &inputs, &outputs}, threads, sequences);
  std::vector<Unit> short_units;
  std::copy_if(units.begin(), units.end(), std::back_inserter(short_units), is_short);
  forward_short_units(level, pass, threads, short_units);
  std::erase_if(units, is_short);

  // As many units at a time as their packed keys allow, and enough of them to feed every thread.
  const auto at_least = static_cast<std::size_t>(threads);
  std::size_t begin = 0;
  while (begin < units.size()) {
    std::size_t end = begin;
    for (std::int64_t size = 0; end < units.size() && (end - begin < at_least || size <= packed_limit); ++end) {
      size += std::int64_t{units[end].sequence.k.length} * (problem.scored_dims() + problem.head_dim_v);
    }
    forward_units(level, pass, threads, units.data() + begin, units.data() + end);
    begin = end;
  }
}

}  // namespace flash_attn::cpu
