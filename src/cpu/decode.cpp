// Decode: how a sequence's heads and keys are divided into tasks. Arithmetic is in decode_kernel.h.
//
// A task takes the kv heads that lie side by side in memory, so that it walks the cache in order, and a run of keys; what
// the runs of a sequence give is combined by LSE. Divisions depend on the shape alone, never on threads: so do results.

#include "cpu/decode.h"

#include <algorithm>
#include <cstdlib>

#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/sequences.h"

namespace flash_attn::cpu {
namespace {

// Rows of a kv head above which its keys are better packed, once, and multiplied by register tiles.
constexpr std::int32_t max_rows_of_head = 16;

// Elements of K and V that a run of keys has at least: enough that combining its result costs nothing beside it.
constexpr std::int64_t elements_of_run = 512 * 1024;
constexpr std::int32_t shortest_run = 128;  // keys
constexpr std::int32_t max_splits = 256;

// O of a task stays in L2.
constexpr std::int64_t max_output_elements = 64 * 1024;

std::int32_t kv_heads_of_task(const AttentionProblem& problem, const AttentionInputs& inputs, std::int32_t rows_of_head) {
  const bool heads_are_inner = std::llabs(inputs.k.strides.head) <= std::llabs(inputs.k.strides.seq);
  if (!heads_are_inner) return 1;
  const std::int64_t fits = std::min<std::int64_t>(max_decode_rows / rows_of_head,
                                                   max_output_elements / (std::int64_t{rows_of_head} * problem.head_dim_v));
  return static_cast<std::int32_t>(std::clamp<std::int64_t>(fits, 1, problem.heads_k));
}

std::vector<Unit> units_of_sequence(const AttentionProblem& problem, const AttentionInputs& inputs, std::int32_t batch,
                                    const Sequence& sequence) {
  const MaskRule rule = problem.mask_rule(sequence.q.length, sequence.k.length);
  const std::int32_t group = problem.group();
  const std::int32_t at_once = kv_heads_of_task(problem, inputs, sequence.q.length * group);
  std::vector<Unit> units;
  for (std::int32_t head = 0; head < problem.heads_k; head += at_once) {
    units.push_back({batch, head, std::min(at_once, problem.heads_k - head), head * group, group, sequence, rule});
  }
  return units;
}

// Runs of the keys that a unit sees; at least one, which may be empty.
std::vector<KeyRange> runs_of_keys(const AttentionProblem& problem, const Unit& unit) {
  const KeyRange seen = visible_keys_of_rows(unit.rule, 0, unit.rule.seqlen_q);
  const std::int32_t keys = std::max(seen.end - seen.begin, 0);
  const std::int64_t elements_of_key = std::int64_t{unit.kv_heads} * (problem.head_dim + problem.head_dim_v);
  const std::int32_t splits =
      problem.num_splits > 0
          ? problem.num_splits
          : keys / static_cast<std::int32_t>(std::max<std::int64_t>(shortest_run, elements_of_run / elements_of_key));
  const std::int32_t count = std::clamp(splits, 1, std::clamp(keys, 1, max_splits));
  std::vector<KeyRange> runs;
  std::int32_t begin = seen.begin;
  for (std::int32_t i = 1; i <= count; ++i) {
    const auto end = static_cast<std::int32_t>(seen.begin + std::int64_t{keys} * i / count);
    runs.push_back({begin, end});
    begin = end;
  }
  return runs;
}

struct UnitParts {
  Unit unit;
  std::size_t first_task;
  std::int32_t count;
};

}  // namespace

bool suits_decode(const AttentionProblem& problem, const AttentionInputs& inputs, const Sequence& sequence) {
  const auto rows_are_contiguous = [](const ConstTensor& tensor, std::int32_t dim) {
    return tensor.strides.dim == 1 || dim == 1;
  };
  const std::int64_t rows = std::int64_t{sequence.q.length} * problem.group();
  return 0 < rows && rows <= max_rows_of_head && rows_are_contiguous(inputs.k, problem.head_dim) &&
         rows_are_contiguous(inputs.v, problem.head_dim_v);
}

void decode_sequences(const Kernels& level, const DecodePass& pass, int threads, const std::vector<Sequence>& sequences) {
  const AttentionProblem& problem = *pass.problem;
  std::vector<UnitParts> units;
  for (std::size_t batch = 0; batch < sequences.size(); ++batch) {
    if (!suits_decode(problem, *pass.inputs, sequences[batch])) continue;
    for (const Unit& unit :
         units_of_sequence(problem, *pass.inputs, static_cast<std::int32_t>(batch), sequences[batch])) {
      units.push_back({unit, 0, 0});
    }
  }
  if (units.empty()) return;

  std::vector<DecodeTask> tasks;
  std::int64_t partial_floats = 0;
  std::int32_t most_rows = 0;
  const std::int64_t row_size = level.partial_row_size(problem);
  for (UnitParts& parts : units) {
    const std::vector<KeyRange> runs = runs_of_keys(problem, parts.unit);
    parts.first_task = tasks.size();
    parts.count = static_cast<std::int32_t>(runs.size());
    for (std::int32_t split = 0; split < parts.count; ++split) {
      tasks.push_back({&parts.unit, runs[static_cast<std::size_t>(split)], split, {nullptr, nullptr}});
    }
    most_rows = std::max(most_rows, parts.unit.packed_rows());
    if (parts.count > 1) partial_floats += parts.count * parts.unit.packed_rows() * (row_size + 1);
  }

  const Buffer partials = allocate(partial_floats);
  float* next = partials.get();
  std::vector<Partial> partial_of_task(tasks.size());
  for (const UnitParts& parts : units) {
    if (parts.count == 1) continue;
    const std::int64_t rows = parts.unit.packed_rows();
    for (std::size_t i = parts.first_task; i < parts.first_task + static_cast<std::size_t>(parts.count); ++i) {
      partial_of_task[i] = tasks[i].partial = {next, next + rows * row_size};
      next += rows * (row_size + 1);
    }
  }

  const std::int64_t scratch_size = (level.decode_scratch_size(pass, most_rows) + 15) / 16 * 16;
  const Buffer scratch = allocate(scratch_size * threads);
  parallel_for(static_cast<std::int64_t>(tasks.size()), threads, [&](std::int64_t i, int slot) {
    level.decode(pass, tasks[static_cast<std::size_t>(i)], scratch.get() + slot * scratch_size);
  });
  parallel_for(static_cast<std::int64_t>(units.size()), threads, [&](std::int64_t i, int) {
    const UnitParts& parts = units[static_cast<std::size_t>(i)];
    if (parts.count > 1) level.combine_partials(pass, parts.unit, partial_of_task.data() + parts.first_task, parts.count);
  });
}

}  // namespace flash_attn::cpu
