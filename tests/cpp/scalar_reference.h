// What attention is: forward and backward in double, one element after another. Everything else is compared with this.
#pragma once

#include <vector>

#include "cpu/attention.h"
#include "semantics/sequence.h"

namespace flash_attn::test {

/// Where a batch item's queries and keys lie, after every clamp.
struct SequencePair {
  Extent q;
  Extent k;  // of slots, with a cache

  // With a cache only.
  std::int32_t cache_row;  // or row of the block table; the cache has it, or the sequence has no keys
  Extent appended;         // slots that new keys fill
  std::int32_t first_new;  // their first row in NewKeys
};

std::vector<SequencePair> sequence_pairs(const AttentionProblem& problem, const cpu::AttentionInputs& inputs);

/// Rows count batch * max_seqlen when dense, else total; every slot of a cache.
std::int64_t query_rows(const AttentionProblem& problem);
std::int64_t key_rows(const AttentionProblem& problem);
/// Query `i` of batch item `batch`'s sequence among those rows.
std::int64_t query_row(const AttentionProblem& problem, const SequencePair& pair, std::int64_t batch, std::int64_t i);

/// Along the first two axes of k and v.
struct KeyPlace {
  std::int64_t batch;  // batch item, cache row or page
  std::int64_t row;
  bool exists;  // false: on a page that the cache lacks
};

KeyPlace key_place(const AttentionProblem& problem, const cpu::AttentionInputs& inputs, const SequencePair& pair,
                   std::int64_t batch, std::int64_t j);
/// Of a slot of the sequence's row of the cache.
KeyPlace cache_place(const AttentionProblem& problem, const cpu::AttentionInputs& inputs, const SequencePair& pair,
                     std::int64_t slot);

/// Element `d` of a head of k or v, whatever it is stored as.
double read_key(const cpu::ConstTensor& tensor, const cpu::ConstQuantization& quantization, const KeyPlace& place,
                std::int64_t head, std::int64_t d);

// Sums over keys or queries.
struct Sums {
  std::vector<double> values;
  std::vector<double> magnitudes;  // the same sums of the terms' absolute values, for error bounds
};

struct ReferenceForward {
  Sums out;                      // [query rows, heads_q, head_dim_v]
  std::vector<double> lse;       // [query rows, heads_q]
  std::vector<double> products;  // [query rows, heads_q]: the largest sum of |q k| of a score, scaled, for error bounds
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
