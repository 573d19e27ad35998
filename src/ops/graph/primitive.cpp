#include "ops/graph/primitive.h"

#include <memory>
#include <stdexcept>
#include <string>

#include "flash_attn/attention.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "ops/graph/attention_node.h"
#include "ops/graph/cpu_views.h"
#include "ops/graph/strided_copy.h"
#include "ops/graph/vjp.h"
#include "ops/graph/vmap_by_slices.h"
#include "ops/metal/attention.h"

namespace flash_attn {
namespace {

/// Kernels read the codes of a quantised row side by side: a last axis that is not contiguous is copied.
void make_rows_of_codes_whole(AttentionCall& call) {
  if (!call.optional.k_scales) return;
  mx::cpu::CommandEncoder& encoder = mx::cpu::get_command_encoder(call.stream);
  for (mx::array* codes : {&call.k, &call.v}) {
    if (codes->strides(-1) == 1 || codes->shape(-1) == 1) continue;
    mx::array whole(codes->shape(), codes->dtype(), nullptr, {});
    allocate(whole);
    encoder.dispatch([copy = StridedCopy(*codes, whole)]() mutable { copy.run(); });
    encoder.add_temporary(whole);
    *codes = std::move(whole);
  }
}

class FlashAttention final : public AttentionNode {
 public:
  using AttentionNode::AttentionNode;

  DEFINE_NAME(FlashAttention)

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    allocate(outputs);
    AttentionCall call = call_of(inputs);
    make_rows_of_codes_whole(call);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [problem = call.problem, inputs = cpu_inputs(call),
         outputs = cpu::ForwardOutputs{result_view(outputs[0]), outputs[1].data<float>(), lse_strides(outputs[1])}] {
          cpu::forward(problem, inputs, outputs);
        });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) override {
    return attention_vjp(call_of(primals), {outputs[0], outputs[1]}, {cotangents[0], cotangents[1]}, argnums);
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    return vmap_by_slices(inputs, axes, stream(), [this](const Arrays& slice) {
      const auto [out, lse] = attention_node(call_of(slice));
      return Arrays{out, lse};
    });
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const AttentionCall call = call_of(inputs);
    return {out_shape(call), lse_shape(call)};
  }
};

class FlashAttentionVJP final : public AttentionNode {
 public:
  FlashAttentionVJP(const AttentionCall& call, WantedGradients wanted) : AttentionNode(call), wanted_(wanted) {}

  DEFINE_NAME(FlashAttentionVJP)

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    allocate(outputs);
    const AttentionCall call = call_of(inputs);
    const auto saved = inputs.begin() + call_inputs();
    const cpu::BackwardInputs backward{.out = const_view(saved[0]),
                                       .dout = const_view(saved[2]),
                                       .lse = saved[1].data<float>(),
                                       .lse_strides = lse_strides(saved[1]),
                                       .dlse = saved[3].data<float>(),
                                       .dlse_strides = lse_strides(saved[3])};
    mx::cpu::get_command_encoder(stream()).dispatch(
        [problem = call.problem, inputs = cpu_inputs(call), backward, gradients = gradient_views(outputs)] {
          cpu::backward(problem, inputs, backward, gradients);
        });
  }

  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override {
    throw NotImplementedError(
        "[flash_attn] flash attention has no second derivative; FLASH_ATTENTION_MLX_REF=1 computes with MLX ops, which have "
        "one");
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    return vmap_by_slices(inputs, axes, stream(), [this](const Arrays& slice) {
      const auto saved = slice.begin() + call_inputs();
      Arrays gradients;
      for (auto& gradient : backward_node(call_of(slice), {saved[0], saved[1]}, {saved[2], saved[3]}, wanted_)) {
        if (gradient) gradients.push_back(std::move(*gradient));
      }
      return gradients;
    });
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return AttentionNode::is_equivalent(other) && wanted_ == static_cast<const FlashAttentionVJP&>(other).wanted_;
  }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    const AttentionCall call = call_of(inputs);
    const GradientSet differentiable = {call.q, call.k, call.v, call.optional.attn_mask, call.optional.learnable_sink};
    std::vector<mx::Shape> shapes;
    for (std::size_t i = 0; i < wanted_.size(); ++i) {
      if (wanted_[i]) shapes.push_back(differentiable[i]->shape());
    }
    return shapes;
  }

 private:
  /// `outputs` has the wanted ones only.
  cpu::Gradients gradient_views(Arrays& outputs) const {
    cpu::Gradients gradients;
    auto next = outputs.begin();
    if (wanted_[wrt_q]) gradients.dq = result_view(*next++);
    if (wanted_[wrt_k]) gradients.dk = result_view(*next++);
    if (wanted_[wrt_v]) gradients.dv = result_view(*next++);
    if (wanted_[wrt_attn_mask]) {
      mx::array& dmask = *next++;
      gradients.dmask = dmask.data<float>();
      gradients.dmask_batch = dmask.shape(0);
      gradients.dmask_heads = dmask.shape(1);
      gradients.dmask_rows = dmask.shape(2);
      gradients.dmask_keys = dmask.shape(3);
    }
    if (wanted_[wrt_learnable_sink]) gradients.dsink = (next++)->data<float>();
    return gradients;
  }

  WantedGradients wanted_;
};

}  // namespace

AttentionOutputs attention_node(const AttentionCall& given) {
  if (runs_on_metal(given.stream)) return metal_attention(given);
  AttentionCall call = given;
  call.optional = with_contiguous_vectors(std::move(call.optional), call.stream);
  auto outputs = mx::array::make_arrays({out_shape(call), lse_shape(call)}, {call.q.dtype(), mx::float32},
                                        std::make_shared<FlashAttention>(call), node_inputs(call));
  return {outputs[0], outputs[1]};
}

GradientSet backward_node(const AttentionCall& given, const AttentionOutputs& outputs, const AttentionCotangents& cotangents,
                          WantedGradients wanted) {
  if (runs_on_metal(given.stream)) return metal_backward(given, outputs, cotangents, wanted);
  AttentionCall call = given;
  call.optional = with_contiguous_vectors(std::move(call.optional), call.stream);
  Arrays inputs = node_inputs(call);
  inputs.insert(inputs.end(), {outputs.out, outputs.lse, cotangents.dout, cotangents.dlse});

  std::vector<mx::Dtype> dtypes;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i]) dtypes.push_back(i <= wrt_v ? call.q.dtype() : mx::float32);
  }
  auto node = std::make_shared<FlashAttentionVJP>(call, wanted);
  auto shapes = node->output_shapes(inputs);
  Arrays arrays = mx::array::make_arrays(std::move(shapes), dtypes, node, inputs);

  GradientSet gradients;
  auto next = arrays.begin();
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i]) gradients[i] = std::move(*next++);
  }
  return gradients;
}

}  // namespace flash_attn
