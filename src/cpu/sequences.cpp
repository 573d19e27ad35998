#include "cpu/sequences.h"

#include <algorithm>
#include <cstring>

namespace flash_attn::cpu {
namespace {

struct Lengths {
  const std::int32_t* cu_seqlens;
  const std::int32_t* seqused;
  std::int32_t total;
  std::int32_t max_seqlen;
};

Extent extent_of(const Lengths& lengths, std::int32_t batch, std::int32_t previous_end) {
  const std::int32_t used = lengths.seqused ? lengths.seqused[batch] : lengths.max_seqlen;
  if (!lengths.cu_seqlens) return sequence_extent(0, lengths.max_seqlen, 0, lengths.max_seqlen, lengths.max_seqlen, used);
  return sequence_extent(lengths.cu_seqlens[batch], lengths.cu_seqlens[batch + 1], previous_end, lengths.total,
                         lengths.max_seqlen, used);
}

// Leftpad comes off the front of what the cache holds, new keys are behind it. A row that the cache lacks holds nothing.
Sequence cached_sequence(const AttentionProblem& problem, const AttentionInputs& inputs, std::int32_t batch, Extent q) {
  const std::int32_t cache_row = cache_row_of(problem, inputs, batch);
  if (cache_row < 0) return {q, {0, 0}, 0};
  const std::int64_t used = std::int64_t{keys_in_cache(problem, inputs, batch)} + new_keys_of(problem, inputs, batch).length;
  const auto end = static_cast<std::int32_t>(std::min<std::int64_t>(used, problem.key_capacity()));
  const std::int32_t begin = inputs.cache.leftpad ? clamp_to(inputs.cache.leftpad[batch], 0, end) : 0;
  return {q, {begin, end - begin}, cache_row};
}

}  // namespace

std::int32_t cache_row_of(const AttentionProblem& problem, const AttentionInputs& inputs, std::int32_t batch) {
  const std::int32_t rows = problem.page_size > 0 ? problem.table_rows : problem.cache_rows;
  const std::int32_t row = inputs.cache.batch_idx ? inputs.cache.batch_idx[batch] : batch;
  return 0 <= row && row < rows ? row : -1;
}

std::int32_t keys_in_cache(const AttentionProblem& problem, const AttentionInputs& inputs, std::int32_t batch) {
  const std::int32_t capacity = problem.key_capacity();
  return inputs.seqused_k ? clamp_to(inputs.seqused_k[batch], 0, capacity) : capacity;
}

Extent new_keys_of(const AttentionProblem& problem, const AttentionInputs& inputs, std::int32_t batch) {
  const std::int32_t* starts = inputs.cache.cu_seqlens_new;
  if (!starts) return {0, problem.seqlen_new};
  return sequence_extent(starts[batch], starts[batch + 1], 0, problem.total_new, problem.total_new, problem.total_new);
}

std::vector<Sequence> sequences_of(const AttentionProblem& problem, const AttentionInputs& inputs) {
  const Lengths q = {inputs.cu_seqlens_q, inputs.seqused_q, problem.total_q, problem.max_seqlen_q};
  const Lengths k = {inputs.cu_seqlens_k, inputs.seqused_k, problem.total_k, problem.max_seqlen_k};
  std::vector<Sequence> sequences;
  sequences.reserve(static_cast<std::size_t>(problem.batch));
  Sequence previous = {};
  for (std::int32_t batch = 0; batch < problem.batch; ++batch) {
    const Extent rows = extent_of(q, batch, previous.q.begin + previous.q.length);
    const Sequence sequence = problem.cached ? cached_sequence(problem, inputs, batch, rows)
                                             : Sequence{rows, extent_of(k, batch, previous.k.begin + previous.k.length), batch};
    sequences.push_back(sequence);
    previous = sequence;
  }
  return sequences;
}

std::vector<Unit> units_of(const AttentionProblem& problem, const std::vector<Sequence>& sequences) {
  std::vector<Unit> units;
  units.reserve(sequences.size() * static_cast<std::size_t>(problem.heads_k));
  for (std::size_t batch = 0; batch < sequences.size(); ++batch) {
    const Sequence& sequence = sequences[batch];
    const MaskRule rule = problem.mask_rule(sequence.q.length, sequence.k.length);
    for (std::int32_t kv_head = 0; kv_head < problem.heads_k; ++kv_head) {
      units.push_back(
          {static_cast<std::int32_t>(batch), kv_head, 1, kv_head * problem.group(), problem.group(), sequence, rule});
    }
  }
  return units;
}

void for_each_unused_row(const AttentionProblem& problem, const std::vector<Sequence>& sequences, Side side,
                         const std::function<void(std::int64_t batch, std::int64_t row)>& visit) {
  const std::int64_t total = side == Side::q ? problem.total_q : problem.total_k;
  const std::int64_t max_seqlen = side == Side::q ? problem.max_seqlen_q : problem.max_seqlen_k;
  std::int64_t covered = 0;
  for (std::size_t batch = 0; batch < sequences.size(); ++batch) {
    const Extent& extent = side == Side::q ? sequences[batch].q : sequences[batch].k;
    if (problem.varlen) {
      for (; covered < extent.begin; ++covered) visit(0, covered);
      covered = extent.begin + extent.length;
    } else {
      for (std::int64_t row = extent.length; row < max_seqlen; ++row) visit(static_cast<std::int64_t>(batch), row);
    }
  }
  if (problem.varlen) {
    for (; covered < total; ++covered) visit(0, covered);
  }
}

void zero_row(const Tensor& tensor, std::int64_t batch, std::int64_t row, std::int64_t heads, std::int64_t dim) {
  const std::size_t size = tensor.dtype == DType::float32 ? 4 : 2;
  for (std::int64_t head = 0; head < heads; ++head) {
    for (std::int64_t d = 0; d < dim; ++d) {
      const std::int64_t offset =
          batch * tensor.strides.batch + row * tensor.strides.seq + head * tensor.strides.head + d * tensor.strides.dim;
      std::memset(static_cast<char*>(tensor.data) + offset * static_cast<std::int64_t>(size), 0, size);
    }
  }
}

}  // namespace flash_attn::cpu
