// Appending to a cache, and the rotation of queries: which rows go where, and which thread takes them.

#include <algorithm>
#include <vector>

#include "cpu/attention.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/sequences.h"

namespace flash_attn::cpu {
namespace {

// Below this, waking a thread costs more than it saves.
constexpr std::int64_t elements_per_thread = 32 * 1024;

int threads_for(std::int64_t elements) {
  return static_cast<int>(std::clamp<std::int64_t>(elements / elements_per_thread, 1, thread_count()));
}

std::int32_t rotary_base(const AttentionProblem& problem, const AttentionInputs& inputs, const RotaryTable& rotary,
                         std::int32_t batch) {
  // Past the table, every position has its last row's angles; cut here, so that no position overflows.
  if (rotary.seqlens) return clamp_to(rotary.seqlens[batch], 0, problem.rotary_rows);
  return keys_in_cache(problem, inputs, batch);
}

std::vector<NewRows> new_rows(const AttentionProblem& problem, const AttentionInputs& inputs, const RotaryTable& rotary) {
  std::vector<NewRows> sequences;
  for (std::int32_t batch = 0; batch < problem.batch; ++batch) {
    const std::int32_t cache_row = cache_row_of(problem, inputs, batch);
    if (cache_row < 0) continue;
    const std::int32_t first_slot = keys_in_cache(problem, inputs, batch);
    Extent rows = new_keys_of(problem, inputs, batch);
    rows.length = std::min(rows.length, problem.key_capacity() - first_slot);
    sequences.push_back(
        {inputs.cache.cu_seqlens_new ? 0 : batch, cache_row, first_slot, rows, rotary_base(problem, inputs, rotary, batch)});
  }
  return sequences;
}

}  // namespace

void append(const AttentionProblem& problem, const AttentionInputs& inputs, const NewKeys& new_keys, const RotaryTable& rotary,
            const WritableCache& cache) {
  const Kernels& level = kernels();
  const std::vector<NewRows> sequences = new_rows(problem, inputs, rotary);
  const AppendPass pass = {
      &problem, &inputs, &new_keys, &rotary, &cache, sequences.data(), static_cast<std::int32_t>(sequences.size())};
  std::int64_t elements = 0;
  for (const NewRows& sequence : sequences) {
    elements += std::int64_t{sequence.rows.length} * problem.heads_k * (problem.head_dim + problem.head_dim_v);
  }
  parallel_for(2 * problem.heads_k, threads_for(elements), [&](std::int64_t i, int) {
    level.append_rows(pass, {static_cast<std::int32_t>(i / 2), i % 2 == 1});
  });
}

void rotate_queries(const AttentionProblem& problem, const AttentionInputs& inputs, const RotaryTable& rotary,
                    const Tensor& rotated) {
  const Kernels& level = kernels();
  const std::vector<Sequence> sequences = sequences_of(problem, inputs);
  const RotatePass pass = {&problem, &inputs, &rotary, &rotated};
  std::vector<RotateTask> tasks;
  std::int64_t elements = 0;
  for (std::int32_t batch = 0; batch < problem.batch; ++batch) {
    const Extent& rows = sequences[static_cast<std::size_t>(batch)].q;
    for (std::int32_t head = 0; head < problem.heads_q; ++head) {
      tasks.push_back({problem.varlen ? 0 : batch, rows, head, rotary_base(problem, inputs, rotary, batch)});
    }
    elements += std::int64_t{rows.length} * problem.heads_q * problem.head_dim;
  }
  parallel_for(static_cast<std::int64_t>(tasks.size()), threads_for(elements),
               [&](std::int64_t i, int) { level.rotate_rows(pass, tasks[static_cast<std::size_t>(i)]); });
}

}  // namespace flash_attn::cpu
