// What attention is: forward and backward in double, one element after another. Everything else is compared with this.
#pragma once

#include <vector>

#include "cpu/attention.h"
#include "semantics/sequence.h"

namespace flash_attn::test {

/// Where a batch item's queries and keys lie, after every clamp.
struct SequencePair {
  Extent q;
  Extent k;
};

std::vector<SequencePair> sequence_pairs(const AttentionProblem& problem, const cpu::AttentionInputs& inputs);

/// Rows count batch * max_seqlen when dense, else total.
std::int64_t query_rows(const AttentionProblem& problem);
std::int64_t key_rows(const AttentionProblem& problem);
/// Position `i` of batch item `batch`'s sequence among those rows.
std::int64_t query_row(const AttentionProblem& problem, const SequencePair& pair, std::int64_t batch, std::int64_t i);
std::int64_t key_row(const AttentionProblem& problem, const SequencePair& pair, std::int64_t batch, std::int64_t j);

// Sums over keys or queries.
struct Sums {
  std::vector<double> values;
  std::vector<double> magnitudes;  // the same sums of the terms' absolute values, for error bounds
};

struct ReferenceForward {
  Sums out;                 // [query rows, heads_q, head_dim_v]
  std::vector<double> lse;  // [query rows, heads_q]
};

struct ReferenceGradients {
  Sums dq;                    // [query rows, heads_q, head_dim]
  Sums dk;                    // [key rows, heads_k, head_dim]
  Sums dv;                    // [key rows, heads_k, head_dim_v]
  std::vector<double> dsink;  // [heads_q]
  std::vector<double> dmask;  // shaped as `Gradients` says
};

ReferenceForward reference_forward(const AttentionProblem& problem, const cpu::AttentionInputs& inputs);

/// Takes D = rowsum(dO * O) from the saved `out`, which may be rounded, but recomputes the softmax. Of `shapes`, only the four
/// sizes of dmask are read.
ReferenceGradients reference_backward(const AttentionProblem& problem, const cpu::AttentionInputs& inputs,
                                      const cpu::BackwardInputs& saved, const cpu::Gradients& shapes);

}  // namespace flash_attn::test
