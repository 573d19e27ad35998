#include "cpu/sequences.h"

namespace flash_attn::cpu {
namespace {

struct Side {
  const std::int32_t* cu_seqlens;
  const std::int32_t* seqused;
  std::int32_t total;
  std::int32_t max_seqlen;
};

Extent extent_of(const Side& side, std::int32_t batch, std::int32_t previous_end) {
  const std::int32_t used = side.seqused ? side.seqused[batch] : side.max_seqlen;
  if (!side.cu_seqlens) return sequence_extent(0, side.max_seqlen, 0, side.max_seqlen, side.max_seqlen, used);
  return sequence_extent(side.cu_seqlens[batch], side.cu_seqlens[batch + 1], previous_end, side.total, side.max_seqlen, used);
}

}  // namespace

std::vector<Sequence> sequences_of(const AttentionProblem& problem, const AttentionInputs& inputs) {
  const Side q = {inputs.cu_seqlens_q, inputs.seqused_q, problem.total_q, problem.max_seqlen_q};
  const Side k = {inputs.cu_seqlens_k, inputs.seqused_k, problem.total_k, problem.max_seqlen_k};
  std::vector<Sequence> sequences;
  sequences.reserve(static_cast<std::size_t>(problem.batch));
  Sequence previous = {};
  for (std::int32_t batch = 0; batch < problem.batch; ++batch) {
    const Sequence sequence = {extent_of(q, batch, previous.q.begin + previous.q.length),
                               extent_of(k, batch, previous.k.begin + previous.k.length)};
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
      units.push_back({static_cast<std::int32_t>(batch), kv_head, sequence, rule, sequence.q.length * problem.group()});
    }
  }
  return units;
}

}  // namespace flash_attn::cpu
