#include "ops/call/inputs.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "ops/call/check.h"

namespace flash_attn {

Presence presence(const OptionalInputs& optional) {
  Presence present;
  for (std::size_t i = 0; i < optional_inputs.size(); ++i) present[i] = (optional.*optional_inputs[i].member).has_value();
  return present;
}

std::vector<mx::array> node_inputs(const AttentionCall& call) {
  std::vector<mx::array> inputs = {call.q, call.k, call.v};
  for (const OptionalInput& input : optional_inputs) {
    if (const auto& array = call.optional.*input.member) inputs.push_back(*array);
  }
  return inputs;
}

AttentionCall call_of_node(AttentionProblem problem, Presence present, const std::vector<mx::array>& inputs,
                           mx::Stream stream) {
  OptionalInputs optional;
  std::size_t next = 3;
  for (std::size_t i = 0; i < optional_inputs.size(); ++i) {
    if (present[i]) optional.*optional_inputs[i].member = inputs.at(next++);
  }
  set_sizes(problem, inputs[0], inputs[1], inputs[2], optional);
  AttentionCall call{problem, inputs[0], inputs[1], inputs[2], std::move(optional), stream};
  check_shapes(call);
  return call;
}

namespace {

void set_cache_sizes(AttentionProblem& problem, const mx::array& k, const OptionalInputs& optional) {
  problem.cache_rows = k.shape(0);
  if (optional.block_table) {
    problem.page_size = k.shape(1);
    problem.table_rows = optional.block_table->shape(0);
    problem.table_blocks = optional.block_table->shape(1);
    const std::int64_t slots = std::int64_t{problem.table_blocks} * problem.page_size;
    // Packed queries come with a bound of their own.
    if (!problem.varlen)
      problem.max_seqlen_k = static_cast<int>(std::min<std::int64_t>(slots, std::numeric_limits<int>::max()));
  } else {
    problem.max_seqlen_k = k.shape(1);
  }
  if (optional.k_new) {
    const bool packed = optional.cu_seqlens_k_new.has_value();
    (packed ? problem.total_new : problem.seqlen_new) = optional.k_new->shape(-3);
  }
  if (optional.rotary_cos) problem.rotary_rows = optional.rotary_cos->shape(0);
}

}  // namespace

int values_of_codes(const mx::array& codes, const std::optional<mx::array>& biases) {
  return biases ? biases->shape(-1) * quantization_group : codes.shape(-1);
}

void set_sizes(AttentionProblem& problem, const mx::array& q, const mx::array& k, const mx::array& v,
               const OptionalInputs& optional) {
  problem.heads_q = q.shape(-2);
  problem.heads_k = k.shape(-2);
  problem.head_dim = q.shape(-1);
  problem.head_dim_v = values_of_codes(v, optional.v_biases);
  if (problem.varlen) {
    problem.batch = optional.cu_seqlens_q->shape(0) - 1;
    problem.total_q = q.shape(0);
    problem.total_k = problem.cached ? 0 : k.shape(0);
  } else {
    problem.batch = q.shape(0);
    problem.max_seqlen_q = q.shape(1);
    if (!problem.cached) problem.max_seqlen_k = k.shape(1);
  }
  if (problem.cached) set_cache_sizes(problem, k, optional);
}

}  // namespace flash_attn
