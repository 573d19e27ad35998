#include "append_reference.h"

#include <algorithm>
#include <limits>

#include "element.h"

namespace flash_attn::test {
namespace {

double rounded(DType dtype, double value) {
  std::uint32_t memory;
  write_element(&memory, dtype, 0, value);
  return read_element(&memory, dtype, 0);
}

std::vector<double> elements_of(const cpu::ConstTensor& tensor, std::int64_t batch, std::int64_t row, std::int64_t head,
                                std::int64_t dim) {
  const cpu::Strides& strides = tensor.strides;
  std::vector<double> elements;
  for (std::int64_t d = 0; d < dim; ++d) {
    const std::int64_t index = batch * strides.batch + row * strides.seq + head * strides.head + d * strides.dim;
    elements.push_back(read_element(tensor.data, tensor.dtype, index));
  }
  return elements;
}

void rotate_elements(const AttentionProblem& problem, const cpu::RotaryTable& table, std::int64_t position,
                     std::vector<double>& row) {
  const std::int64_t angles = std::clamp<std::int64_t>(position, 0, problem.rotary_rows - 1);
  const std::int64_t pairs = problem.rotary_dim / 2;
  for (std::int64_t t = 0; t < pairs; ++t) {
    const double cosine = read_element(table.cos, table.dtype, angles * table.cos_stride + t);
    const double sine = read_element(table.sin, table.dtype, angles * table.sin_stride + t);
    double& first = row[static_cast<std::size_t>(problem.rotary_interleaved ? 2 * t : t)];
    double& second = row[static_cast<std::size_t>(problem.rotary_interleaved ? 2 * t + 1 : t + pairs)];
    const double x = first;
    const double y = second;
    first = rounded(problem.dtype, x * cosine - y * sine);
    second = rounded(problem.dtype, x * sine + y * cosine);
  }
}

// Angle of a sequence's first new token.
std::int64_t first_position(const AttentionProblem& problem, const cpu::AttentionInputs& inputs, const cpu::RotaryTable& rotary,
                            std::int64_t batch) {
  if (rotary.seqlens) return std::max(rotary.seqlens[batch], 0);
  const std::int64_t slots = std::int64_t{problem.table_blocks} * problem.page_size;
  const std::int64_t capacity =
      problem.page_size > 0 ? std::min<std::int64_t>(slots, problem.max_seqlen_k) : problem.max_seqlen_k;
  return inputs.seqused_k ? std::clamp<std::int64_t>(inputs.seqused_k[batch], 0, capacity) : capacity;
}

}  // namespace

std::vector<AppendedRow> reference_append(const AttentionProblem& problem, const cpu::AttentionInputs& inputs,
                                          const cpu::NewKeys& new_keys, const cpu::RotaryTable& rotary) {
  std::vector<AppendedRow> rows;
  const std::vector<SequencePair> pairs = sequence_pairs(problem, inputs);
  for (std::int32_t batch = 0; batch < problem.batch; ++batch) {
    const SequencePair& pair = pairs[static_cast<std::size_t>(batch)];
    const std::int64_t source_batch = inputs.cache.cu_seqlens_new ? 0 : batch;
    for (std::int32_t token = 0; token < pair.appended.length; ++token) {
      const KeyPlace place = cache_place(problem, inputs, pair, pair.appended.begin + token);
      if (!place.exists) continue;
      const std::int64_t source_row = pair.first_new + token;
      for (std::int32_t head = 0; head < problem.heads_k; ++head) {
        std::vector<double> k = elements_of(new_keys.k, source_batch, source_row, head, problem.head_dim);
        if (rotary.cos) rotate_elements(problem, rotary, first_position(problem, inputs, rotary, batch) + token, k);
        rows.push_back({place, head, false, std::move(k)});
        rows.push_back({place, head, true, elements_of(new_keys.v, source_batch, source_row, head, problem.head_dim_v)});
      }
    }
  }
  return rows;
}

std::vector<double> reference_rotated_queries(const AttentionProblem& problem, const cpu::AttentionInputs& inputs,
                                              const cpu::RotaryTable& rotary) {
  std::vector<double> rotated(static_cast<std::size_t>(query_rows(problem) * problem.heads_q * problem.head_dim),
                              std::numeric_limits<double>::quiet_NaN());
  const bool order_matters = problem.causal || problem.window_left >= 0 || problem.window_right >= 0;
  const std::vector<SequencePair> pairs = sequence_pairs(problem, inputs);
  for (std::int32_t batch = 0; batch < problem.batch; ++batch) {
    const SequencePair& pair = pairs[static_cast<std::size_t>(batch)];
    for (std::int32_t i = 0; i < pair.q.length; ++i) {
      const std::int64_t position = first_position(problem, inputs, rotary, batch) + (order_matters ? i : 0);
      for (std::int32_t head = 0; head < problem.heads_q; ++head) {
        std::vector<double> q = elements_of(inputs.q, problem.varlen ? 0 : batch, pair.q.begin + i, head, problem.head_dim);
        rotate_elements(problem, rotary, position, q);
        const std::int64_t row = query_row(problem, pair, batch, i) * problem.heads_q + head;
        std::copy(q.begin(), q.end(), rotated.begin() + row * problem.head_dim);
      }
    }
  }
  return rotated;
}

}  // namespace flash_attn::test
