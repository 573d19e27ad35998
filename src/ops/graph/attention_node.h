// What the graph nodes of attention share.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "flash_attn/attention.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "ops/call/call.h"
#include "ops/call/inputs.h"
#include "ops/call/require.h"
#include "ops/graph/aligned_memory.h"
#include "ops/metal/launch.h"

namespace flash_attn {

using Arrays = std::vector<mx::array>;

/// Kernels read the small arrays as plain runs of values. On a CPU one that is so already gets no node: each costs a call
/// microseconds. On Metal it does: without, MLX evaluates queued steps of a cache in an order in which each copies it.
inline OptionalInputs with_contiguous_vectors(OptionalInputs optional, mx::Stream stream) {
  const bool always = runs_on_metal(stream);
  for (const auto& [member, is_run, name] : optional_inputs) {
    auto& array = optional.*member;
    if (!array || !is_run) continue;
    if (!always && is_ready(*array) && array->flags().row_contiguous) continue;
    array = mx::contiguous(*array, false, stream);
  }
  return optional;
}

/// At the beginning of a cache line: rows are then written in whole lines.
inline void allocate(mx::array& output) { allocate_at(output, 64); }

inline void allocate(Arrays& outputs) {
  for (mx::array& output : outputs) allocate(output);
}

/// The call is the node's state; its arrays are the node's inputs.
class AttentionNode : public mx::Primitive {
 public:
  explicit AttentionNode(const AttentionCall& call)
      : mx::Primitive(call.stream), problem_(call.problem), present_(presence(call.optional)) {}

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string("[flash_attn] ") + name() + " has no GPU kernel in this build");
  }

  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override {
    throw NotImplementedError(
        std::string("[flash_attn] ") + name() +
        " has no jvp (forward-mode derivative); FLASH_ATTENTION_MLX_REF=1 computes with MLX ops that may have one");
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& node = static_cast<const AttentionNode&>(other);
    return problem_ == node.problem_ && present_ == node.present_;
  }

 protected:
  AttentionCall call_of(const Arrays& inputs) { return call_of_node(problem_, present_, inputs, stream()); }

  Presence present() const { return present_; }

  std::size_t call_inputs() const { return 3 + present_.count(); }

 private:
  AttentionProblem problem_;
  Presence present_;
};

inline mx::Shape out_shape(const AttentionCall& call) {
  mx::Shape shape = call.q.shape();
  shape.back() = call.problem.head_dim_v;
  return shape;
}

inline mx::Shape lse_shape(const AttentionCall& call) {
  const AttentionProblem& problem = call.problem;
  if (problem.varlen) return {problem.heads_q, problem.total_q};
  return {problem.batch, problem.heads_q, problem.max_seqlen_q};
}

}  // namespace flash_attn
