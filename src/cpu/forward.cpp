// The forward pass: memory, threads and order. Arithmetic is in forward_kernel.h.

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/attention.h"
#include "cpu/buffer.h"
#include "cpu/decode.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/sequences.h"

namespace flash_attn::cpu {
namespace {

// Query panels that share a task: enough to reuse a key block from L2, few enough to balance the threads.
constexpr std::int32_t panels_per_task = 4;

// Packed K and V held at a time, when a call has more than one unit to a thread.
constexpr std::int64_t packed_limit = std::int64_t{64} << 20;  // floats: 256 MiB

// Keys a block: K and V of a block stay in L2 beside the accumulators.
std::int32_t forward_key_block(const AttentionProblem& problem) {
  return std::max(problem.scored_dims(), problem.head_dim_v) <= 160 ? 120 : 72;
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
  std::int32_t blocks;
};

struct RowTask {
  std::size_t packed_unit;
  std::int32_t row_begin;
  std::int32_t row_end;
  std::int64_t cost;  // keys to visit, for the order only
};

// Units [begin, end): packs their K and V once, then runs their row blocks.
void forward_units(const Kernels& level, const ForwardPass& pass, int threads, const Unit* begin, const Unit* end) {
  std::vector<PackedUnit> packed_units;
  std::int64_t blocks = 0;
  for (const Unit* unit = begin; unit != end; ++unit) {
    const std::int32_t count = (unit->sequence.k.length + pass.key_block - 1) / pass.key_block;
    packed_units.push_back({unit, blocks, count});
    blocks += count;
  }
  const Buffer packed = allocate(blocks * pass.packed_block_size);

  struct BlockTask {
    const Unit* unit;
    std::int32_t block;
    float* destination;
  };
  std::vector<BlockTask> block_tasks;
  const std::int32_t rows_per_task = panels_per_task * level.panel_rows;
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
    level.forward_rows(pass,
                       {unit.unit, packed.get() + unit.first_block * pass.packed_block_size, task.row_begin, task.row_end},
                       scratch.get() + slot * scratch_size);
  });
}

}  // namespace

void forward(const AttentionProblem& problem, const AttentionInputs& inputs, const ForwardOutputs& outputs) {
  const Kernels& level = kernels();
  const std::vector<Sequence> sequences = sequences_of(problem, inputs);
  std::vector<Unit> units = units_of(problem, sequences);
  std::erase_if(units, [&](const Unit& unit) { return suits_decode(problem, inputs, unit.sequence); });
  const std::int32_t key_block = forward_key_block(problem);
  const ForwardPass pass = {&problem, &inputs, &outputs, key_block, level.packed_block_size(problem, key_block)};
  const int threads = thread_count();
  clear_unused_rows(problem, sequences, outputs);
  decode_sequences(level, {&problem, &inputs, &outputs}, threads, sequences);

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
