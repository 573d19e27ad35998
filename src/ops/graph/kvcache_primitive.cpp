#include "ops/graph/kvcache_primitive.h"

#include <memory>
#include <optional>
#include <utility>

#include "cpu/buffer.h"
#include "mlx/backend/cpu/encoder.h"
#include "ops/graph/attention_node.h"
#include "ops/graph/cpu_views.h"
#include "ops/graph/strided_copy.h"
#include "ops/graph/vjp.h"
#include "ops/metal/kvcache.h"
#include "ops/metal/launch.h"

namespace flash_attn {
namespace {

/// Which of a node's inputs the cache is: visit(position) in the order of cache_arrays.
template <class Visit>
void for_each_cache_input(Presence present, Visit visit) {
  constexpr std::size_t k = 1;
  constexpr std::size_t v = 2;
  const auto visit_tensor = [&](std::size_t tensor, std::optional<mx::array> OptionalInputs::*scales,
                                std::optional<mx::array> OptionalInputs::*biases) {
    visit(tensor);
    std::size_t position = 3;
    for (std::size_t i = 0; i < optional_inputs.size(); ++i) {
      if (!present[i]) continue;
      if (optional_inputs[i].member == scales || optional_inputs[i].member == biases) visit(position);
      ++position;
    }
  };
  visit_tensor(k, &OptionalInputs::k_scales, &OptionalInputs::k_biases);
  visit_tensor(v, &OptionalInputs::v_scales, &OptionalInputs::v_biases);
}

/// Every element has its own place in memory, and rows are whole.
bool has_rows(const mx::array& array) {
  return array.flags().contiguous && array.data_size() == array.size() && (array.strides(-1) == 1 || array.shape(-1) == 1);
}

/// Every output of a node refers to the node's inputs; one reference is enough while it is evaluated.
void let_go_of_inputs(const Arrays& inputs, Arrays& outputs) {
  for (mx::array& output : outputs) {
    if (&output.inputs() != &inputs) output.inputs().clear();
  }
}

class FlashAttentionWithKVCache final : public AttentionNode {
 public:
  using AttentionNode::AttentionNode;

  DEFINE_NAME(FlashAttentionWithKVCache)

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    // First of all: any other reference to an input would keep it from being written in place.
    let_go_of_inputs(inputs, outputs);
    std::vector<StridedCopy> copies = take_over_cache(inputs, outputs);
    allocate(outputs[0]);
    allocate(outputs[1]);
    const AttentionCall call = call_on(inputs, outputs);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [problem = call.problem, inputs = cpu_inputs(call), copies = std::move(copies), new_keys = new_keys(call),
         rotary = rotary_table(call), cache = writable_cache(call),
         outputs = cpu::ForwardOutputs{view(outputs[0]), outputs[1].data<float>(), lse_strides(outputs[1])}]() mutable {
          for (StridedCopy& copy : copies) copy.run();
          cpu::append(problem, inputs, new_keys, rotary, cache);
          cpu::Buffer rotated;
          if (rotary.cos) rotated = rotate_queries(problem, inputs, rotary);
          cpu::forward(problem, inputs, outputs);
        });
  }

  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override {
    throw no_gradient_through_cache();
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays&, const std::vector<int>&) override {
    throw NotImplementedError("[flash_attn] attention over a KV cache that changes in place has no vmap; give it a batch");
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const AttentionCall call = call_of(inputs);
    std::vector<mx::Shape> shapes = {out_shape(call), lse_shape(call)};
    for (const mx::array& array : cache_arrays(call)) shapes.push_back(array.shape());
    return shapes;
  }

 private:
  /// MLX holds on to a buffer until the tasks that use it are done: for a cache those of the step before, whose end this one
  /// needs anyway.
  void wait_for_earlier_steps(const Arrays& inputs) {
    bool all_free = true;
    for_each_cache_input(present(), [&](std::size_t position) { all_free = all_free && inputs[position].is_donatable(); });
    if (!all_free) mx::synchronize(stream());
  }

  std::vector<StridedCopy> take_over_cache(const Arrays& inputs, Arrays& outputs) {
    std::vector<StridedCopy> copies;
    wait_for_earlier_steps(inputs);
    auto output = outputs.begin() + 2;
    for_each_cache_input(present(), [&](std::size_t position) {
      const mx::array& input = inputs[position];
      if (input.is_donatable() && has_rows(input)) {
        output->copy_shared_buffer(input);
      } else {
        allocate(*output);
        copies.emplace_back(input, *output);
      }
      ++output;
    });
    return copies;
  }

  /// The call with the cache as this node leaves it.
  AttentionCall call_on(const Arrays& inputs, const Arrays& outputs) {
    Arrays with_outputs = inputs;
    auto output = outputs.begin() + 2;
    for_each_cache_input(present(), [&](std::size_t position) { with_outputs[position] = *output++; });
    return call_of(with_outputs);
  }

  /// Makes `inputs` read rotated queries, which live as long as what it returns.
  static cpu::Buffer rotate_queries(const AttentionProblem& problem, cpu::AttentionInputs& inputs,
                                    const cpu::RotaryTable& rotary) {
    const std::int64_t tokens = problem.varlen ? problem.total_q : std::int64_t{problem.batch} * problem.max_seqlen_q;
    const std::int64_t row = std::int64_t{problem.heads_q} * problem.head_dim;
    cpu::Buffer memory = cpu::allocate(tokens * row);  // float32: enough for any dtype
    const cpu::Strides strides = {problem.varlen ? 0 : problem.max_seqlen_q * row, row, problem.head_dim, 1};
    const cpu::Tensor rotated = {memory.get(), inputs.q.dtype, strides};
    cpu::rotate_queries(problem, inputs, rotary, rotated);
    inputs.q = {rotated.data, rotated.dtype, rotated.strides};
    return memory;
  }
};

}  // namespace

std::vector<mx::array> cache_arrays(const AttentionCall& call) {
  std::vector<mx::array> arrays;
  const Arrays inputs = node_inputs(call);
  for_each_cache_input(presence(call.optional), [&](std::size_t position) { arrays.push_back(inputs[position]); });
  return arrays;
}

KVCacheOutputs kvcache_node(const AttentionCall& given) {
  if (runs_on_metal(given.stream)) return metal_kvcache(given);
  AttentionCall call = given;
  call.optional = with_contiguous_vectors(std::move(call.optional), call.stream);
  std::vector<mx::Shape> shapes = {out_shape(call), lse_shape(call)};
  std::vector<mx::Dtype> dtypes = {call.q.dtype(), mx::float32};
  for (const mx::array& array : cache_arrays(call)) {
    shapes.push_back(array.shape());
    dtypes.push_back(array.dtype());
  }
  Arrays outputs =
      mx::array::make_arrays(std::move(shapes), dtypes, std::make_shared<FlashAttentionWithKVCache>(call), node_inputs(call));
  return {{outputs[0], outputs[1]}, {outputs.begin() + 2, outputs.end()}};
}

}  // namespace flash_attn
