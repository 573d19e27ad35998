// Decode: how a sequence's heads and keys are divided into tasks. Arithmetic is in decode_kernel.h.
//
// A task takes several kv heads, so that it walks a cache in order where these lie side by side and what it does for a block of
// keys is shared, and a run of keys.

#include "cpu/decode.h"

#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/key_runs.h"
#include "cpu/key_slot.h"
#include "cpu/page_order.h"
#include "cpu/sequences.h"

namespace flash_attn::cpu {
namespace {

// Rows of a kv head above which its keys are better packed, once, and multiplied by tiles: sooner where they multiply bfloat16.
std::int32_t max_rows_of_head(DType key_dtype) { return key_dtype == DType::bfloat16 ? 24 : 32; }

// O of a task stays in L2.
constexpr std::int64_t max_output_elements = 32 * 1024;

std::int32_t kv_heads_of_task(const AttentionProblem& problem, std::int32_t rows_of_head) {
  const std::int64_t fits = std::min<std::int64_t>(max_decode_rows / rows_of_head,
                                                   max_output_elements / (std::int64_t{rows_of_head} * problem.head_dim_v));
  return static_cast<std::int32_t>(std::clamp<std::int64_t>(fits, 1, problem.heads_k));
}

void add_units(const AttentionProblem& problem, std::int32_t batch, const Sequence& sequence, std::vector<Unit>& units) {
  const MaskRule rule = problem.mask_rule(sequence.q.length, sequence.k.length);
  const std::int32_t group = problem.group();
  const std::int32_t at_once = kv_heads_of_task(problem, sequence.q.length * group);
  for (std::int32_t head = 0; head < problem.heads_k; head += at_once) {
    units.push_back({batch, head, std::min(at_once, problem.heads_k - head), head * group, group, sequence, rule});
  }
}

// By a unit's keys alone: so what a sequence gives does not depend on its batch. As if they were float32, so that all dtypes
// have one limit.
ReadAhead read_ahead_of_unit(const AttentionProblem& problem, const Unit& unit) {
  const KeyRange seen = visible_keys_of_unit(unit);
  const std::int64_t elements = std::int64_t{unit.kv_heads} * (problem.head_dim + problem.head_dim_v);
  return read_ahead_of(std::max(0, seen.end - seen.begin) * elements * static_cast<std::int64_t>(sizeof(float)));
}

}  // namespace

bool suits_decode(const AttentionProblem& problem, const AttentionInputs& inputs, const Sequence& sequence) {
  const auto rows_are_contiguous = [](const ConstTensor& tensor, std::int32_t dim) {
    return tensor.strides.dim == 1 || dim == 1;
  };
  const std::int64_t rows = std::int64_t{sequence.q.length} * problem.group();
  return 0 < rows && rows <= max_rows_of_head(inputs.k.dtype) && rows_are_contiguous(inputs.k, problem.head_dim) &&
         rows_are_contiguous(inputs.v, problem.head_dim_v);
}

void decode_sequences(const Kernels& level, const DecodePass& call, int threads, std::vector<Sequence> sequences) {
  const AttentionProblem& problem = *call.problem;
  if (std::none_of(sequences.begin(), sequences.end(),
                   [&](const Sequence& x) { return suits_decode(problem, *call.inputs, x); }))
    return;
  const PageOrder order(problem, *call.inputs, threads, sequences);
  const DecodePass pass = {&problem, &order.inputs(), call.outputs};
  std::vector<Unit> units;
  for (std::size_t batch = 0; batch < sequences.size(); ++batch) {
    if (!suits_decode(problem, *pass.inputs, sequences[batch])) continue;
    add_units(problem, static_cast<std::int32_t>(batch), sequences[batch], units);
  }
  // The last heads of a sequence may be fewer than those before them.
  std::int32_t most_rows = 0;
  for (const Unit& unit : units) most_rows = std::max(most_rows, unit.packed_rows());

  KeyRuns runs(level, problem, units, /*granule=*/1);
  // All sequences go through memory together: what the processor reads past the end of one's page may be another's.
  if (problem.page_size > 0) {
    runs.start_in_order([&](const KeyRun& run) {
      if (run.keys.begin >= run.keys.end) return std::int32_t{-1};  // its first key may lie past the table
      return slot_of_key(problem, *pass.inputs, run.unit->sequence, run.unit->batch, run.keys.begin).row;
    });
  }
  const std::int64_t scratch_size = (level.decode_scratch_size(pass, most_rows) + 15) / 16 * 16;
  const Buffer scratch = allocate(scratch_size * threads);
  runs.for_each(threads, [&](const KeyRun& run, int slot) {
    const ReadAhead read_ahead = read_ahead_of_unit(problem, *run.unit);
    level.decode(pass, {run.unit, run.keys, run.is_first, run.partial, read_ahead}, scratch.get() + slot * scratch_size);
  });
  runs.combine(pass, threads);
}

}  // namespace flash_attn::cpu
