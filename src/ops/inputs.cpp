#include "ops/inputs.h"

#include <utility>

#include "ops/check.h"

namespace flash_attn {

Presence presence(const OptionalInputs& optional) {
  Presence present;
  for (std::size_t i = 0; i < optional_inputs.size(); ++i) present[i] = (optional.*optional_inputs[i]).has_value();
  return present;
}

std::vector<mx::array> node_inputs(const AttentionCall& call) {
  std::vector<mx::array> inputs = {call.q, call.k, call.v};
  for (const auto member : optional_inputs) {
    if (const auto& array = call.optional.*member) inputs.push_back(*array);
  }
  return inputs;
}

AttentionCall call_of_node(AttentionProblem problem, Presence present, const std::vector<mx::array>& inputs,
                           mx::Stream stream) {
  OptionalInputs optional;
  std::size_t next = 3;
  for (std::size_t i = 0; i < optional_inputs.size(); ++i) {
    if (present[i]) optional.*optional_inputs[i] = inputs.at(next++);
  }
  set_sizes(problem, inputs[0], inputs[1], inputs[2], optional);
  AttentionCall call{problem, inputs[0], inputs[1], inputs[2], std::move(optional), stream};
  check_shapes(call);
  return call;
}

void set_sizes(AttentionProblem& problem, const mx::array& q, const mx::array& k, const mx::array& v,
               const OptionalInputs& optional) {
  problem.heads_q = q.shape(-2);
  problem.heads_k = k.shape(-2);
  problem.head_dim = q.shape(-1);
  problem.head_dim_v = v.shape(-1);
  if (problem.varlen) {
    problem.batch = optional.cu_seqlens_q->shape(0) - 1;
    problem.total_q = q.shape(0);
    problem.total_k = k.shape(0);
  } else {
    problem.batch = q.shape(0);
    problem.max_seqlen_q = q.shape(1);
    problem.max_seqlen_k = k.shape(1);
  }
}

}  // namespace flash_attn
