// The forward pass: which rows go which way. Few rows read their keys in place (decode.h), somewhat more over very many keys
// divide these (key_runs.h), all others share blocks of packed keys (packed_forward.h).

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
#include "cpu/packed_forward.h"
#include "cpu/parallel.h"
#include "cpu/sequences.h"

namespace flash_attn::cpu {
namespace {

// Keys a block: K and V of a block stay in L2 beside the accumulators.
std::int32_t forward_key_block(const Kernels& level, const AttentionProblem& problem) {
  const std::int32_t about = std::max(problem.scored_dims(), problem.head_dim_v) <= 256 ? 128 : 80;
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

// The units of each sequence in the order in which threads should take them, so that each thread goes from a head to its
// neighbour: their rows lie side by side, and what the processor reads ahead of one's belongs to the other.
std::vector<Unit> dealt_out(const std::vector<Unit>& units, int heads, int threads) {
  const int share = (heads + threads - 1) / threads;
  std::vector<Unit> dealt;
  dealt.reserve(units.size());
  for (auto sequence = units.begin(); sequence != units.end(); sequence += heads) {
    for (int first = 0; first < share; ++first) {
      for (int head = first; head < heads; head += share) dealt.push_back(sequence[head]);
    }
  }
  return dealt;
}

std::int32_t rows_of_task(const Kernels& level) { return panels_per_task * level.panel_rows; }

// Few rows over many keys: each run of keys is packed by the thread that reads it, since no other does.
void forward_divided_units(const Kernels& level, const ForwardPass& pass, int threads, const std::vector<Unit>& units) {
  if (units.empty()) return;
  const KeyRuns runs(level, *pass.problem, units, pass.key_block);
  const std::int64_t scratch_size = (level.forward_scratch_size(pass) + 15) / 16 * 16;
  const Buffer scratch = allocate(scratch_size * threads);
  runs.for_each(threads, [&](const KeyRun& run, int slot) {
    level.forward_rows(pass, {run.unit, nullptr, nullptr, 0, run.unit->packed_rows(), run.keys, run.is_first, run.partial, {}},
                       scratch.get() + slot * scratch_size);
  });
  runs.combine({pass.problem, pass.inputs, pass.outputs}, threads);
}

}  // namespace

void forward(const AttentionProblem& problem, const AttentionInputs& inputs, const ForwardOutputs& outputs) {
  const Kernels& level = kernels();
  const std::vector<Sequence> sequences = sequences_of(problem, inputs);
  std::vector<Unit> units = units_of(problem, sequences);
  std::erase_if(units,
                [&](const Unit& unit) { return unit.packed_rows() == 0 || suits_decode(problem, inputs, unit.sequence); });
  const std::int32_t key_block = forward_key_block(level, problem);
  const ForwardPass pass = {&problem, &inputs, &outputs, key_block, level.packed_block_size(problem, key_block)};
  const int threads = thread_count();
  clear_unused_rows(problem, sequences, outputs);
  decode_sequences(level, {&problem, &inputs, &outputs}, threads, sequences);
  const auto is_divided = [&](const Unit& unit) {
    return unit.packed_rows() <= rows_of_task(level) && are_keys_divided(problem, unit, key_block);
  };
  std::vector<Unit> divided;
  std::copy_if(units.begin(), units.end(), std::back_inserter(divided), is_divided);
  forward_divided_units(level, pass, threads, dealt_out(divided, problem.heads_k, threads));
  std::erase_if(units, is_divided);

  forward_packed_units(level, pass, threads, dealt_out(units, problem.heads_k, threads));
}

}  // namespace flash_attn::cpu
