#include "ops/metal/attention.h"

#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlx/backend/metal/metal.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "ops/graph/attention_node.h"
#include "ops/graph/vjp.h"
#include "ops/metal/kvcache.h"
#include "ops/metal/probe.h"
#include "ops/metal/whole_rows.h"
#include "reference/kvcache.h"
#include "reference/reference.h"

namespace flash_attn {
namespace {

std::string metal_type(const mx::array& array) {
  switch (array.dtype().val()) {
    case mx::Dtype::Val::bfloat16:
      return "bfloat16_t";
    case mx::Dtype::Val::float16:
      return "half";
    case mx::Dtype::Val::float32:
      return "float";
    case mx::Dtype::Val::bool_:
      return "bool";
    case mx::Dtype::Val::int8:
      return "int8_t";
    case mx::Dtype::Val::int32:
      return "int";
    case mx::Dtype::Val::uint32:
      return "uint32_t";
    default:
      throw std::logic_error("[flash_attn] a dtype that no Metal kernel takes");
  }
}

/// Nothing to launch: no output, or no key.
bool is_empty(const AttentionCall& call) {
  return call.q.size() == 0 || call.k.size() == 0 || call.v.size() == 0 || call.problem.max_seqlen_q == 0 ||
         call.problem.max_seqlen_k == 0 || call.problem.batch == 0;
}

// ---- backward

Arrays no_second_derivative(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) {
  throw NotImplementedError(
      "[flash_attn] flash attention has no second derivative; FLASH_ATTENTION_MLX_REF=1 computes with MLX ops, which have one");
}

/// d sink = sum over rows of -P(sink) D: the sink is a key whose value is 0. Rows that are not there have an LSE of -inf.
mx::array sink_gradient(const AttentionCall& call, const mx::array& lse, const mx::array& delta) {
  const mx::Stream stream = call.stream;
  const mx::array sink = mx::expand_dims(*call.optional.learnable_sink, -1, stream);
  const mx::array there = mx::greater(lse, mx::array(-std::numeric_limits<float>::infinity()), stream);
  const mx::array probability = mx::exp(mx::subtract(sink, lse, stream), stream);
  const mx::array terms = mx::where(there, mx::multiply(probability, delta, stream), mx::array(0.0f), stream);
  const std::vector<int> all_but_heads = call.problem.varlen ? std::vector<int>{1} : std::vector<int>{0, 2};
  return mx::negative(mx::sum(terms, all_but_heads, /*keepdims=*/false, stream), stream);
}

AttentionOutputs reference_forward(const AttentionCall& call) {
  if (call.problem.cached) return reference::attention_over_cache(call);
  const reference::Result result = reference::attention(call);
  return {result.out, result.lse};
}

}  // namespace

metal::Operands metal_operands(const AttentionCall& call) {
  metal::Operands operands;
  operands.arrays = {{"q", metal_type(call.q)}, {"k", metal_type(call.k)}, {"v", metal_type(call.v)}};
  for (const OptionalInput& input : optional_inputs) {
    if (const auto& array = call.optional.*input.member) operands.arrays.push_back({input.name, metal_type(*array)});
  }
  const OptionalInputs& optional = call.optional;
  operands.alibi_per_sequence = optional.alibi_slopes && optional.alibi_slopes->ndim() == 2;
  operands.codes_are_affine = optional.k_biases.has_value();
  if (optional.k_scales) {
    operands.k_code_bits = operands.codes_are_affine ? call.k.shape(-1) * 32 / call.problem.head_dim : 8;
    operands.v_code_bits = operands.codes_are_affine ? call.v.shape(-1) * 32 / call.problem.head_dim_v : 8;
  }
  return operands;
}

AttentionCall readable_by_metal(AttentionCall call) {
  call.optional = with_contiguous_vectors(std::move(call.optional), call.stream);
  for (mx::array* tensor : {&call.q, &call.k, &call.v}) *tensor = with_whole_rows(*tensor, call.stream);
  if (call.optional.qv) call.optional.qv = with_whole_rows(*call.optional.qv, call.stream);
  return call;
}

metal::Gpu metal_gpu() {
  if (!mx::metal::is_available()) return {};
  const auto& info = mx::metal::device_info();
  const auto found = info.find("architecture");
  const auto* name = found == info.end() ? nullptr : std::get_if<std::string>(&found->second);
  const std::size_t digits = name ? name->find_first_of("0123456789") : std::string::npos;
  if (digits == std::string::npos) return {};
  // "applegpu_g15s": generation 15; s is a Max, d an Ultra, others have fewer cores.
  const char size = name->back();
  return {.generation = std::atoi(name->c_str() + digits), .threadgroups = size == 'd' ? 512 : size == 's' ? 256 : 64};
}

namespace {

/// The one that attends; several splits of decode are combined by another.
metal::Kernel metal_kernel_of(const AttentionCall& call) {
  const metal::Operands operands = metal_operands(call);
  if (!metal::is_decoded(call.problem)) return metal::forward_kernel(call.problem, operands, metal_gpu());
  return metal::decode_kernel(call.problem, operands, metal::decode_splits(call.problem, metal_gpu()));
}

AttentionOutputs forward_by_kernel(const AttentionCall& given) {
  const AttentionCall call = readable_by_metal(given);
  if (metal::is_decoded(call.problem)) return metal_decode(call);
  const auto vjp = [problem = call.problem, present = presence(call.optional), stream = call.stream](
                       const Arrays& inputs, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) {
    return attention_vjp(call_of_node(problem, present, inputs, stream), {outputs[0], outputs[1]},
                         {cotangents[0], cotangents[1]}, argnums);
  };
  const Arrays outputs = launch_metal(metal::forward_kernel(call.problem, metal_operands(call), metal_gpu()), node_inputs(call),
                                      {out_shape(call), lse_shape(call)}, {call.q.dtype(), mx::float32}, call.stream, vjp);
  return {outputs[0], outputs[1]};
}

GradientSet backward_by_kernels(const AttentionCall& given, const AttentionOutputs& outputs,
                                const AttentionCotangents& cotangents, WantedGradients wanted) {
  const AttentionCall call = readable_by_metal(given);
  const AttentionProblem& problem = call.problem;
  const mx::Stream stream = call.stream;
  const metal::Operands operands = metal_operands(call);
  const auto launch = [&](const metal::Kernel& kernel, const Arrays& inputs, const std::vector<mx::Shape>& shapes,
                          mx::Dtype dtype) {
    const std::vector<mx::Dtype> dtypes(shapes.size(), dtype);
    return launch_metal(kernel, inputs, shapes, dtypes, stream, no_second_derivative);
  };

  const mx::array out = with_whole_rows(outputs.out, stream);
  const mx::array dout = with_whole_rows(cotangents.dout, stream);
  const mx::array lse = mx::contiguous(outputs.lse, false, stream);
  const mx::array dlse = mx::contiguous(cotangents.dlse, false, stream);
  const mx::array delta = launch(metal::delta_kernel(problem, operands), {out, dout, dlse}, {lse.shape()}, mx::float32)[0];
  Arrays inputs = node_inputs(call);
  inputs.insert(inputs.end(), {dout, lse, delta});

  GradientSet gradients;
  const metal::Gpu gpu = metal_gpu();
  if (wanted[wrt_q]) {
    const metal::Kernel kernel = metal::backward_dq_kernel(problem, operands, gpu);
    gradients[wrt_q] = launch(kernel, inputs, {call.q.shape()}, call.q.dtype())[0];
  }
  if (wanted[wrt_k] || wanted[wrt_v]) {
    const metal::Kernel kernel = metal::backward_dkv_kernel(problem, operands, gpu);
    const Arrays dkv = launch(kernel, inputs, {call.k.shape(), call.v.shape()}, call.q.dtype());
    if (wanted[wrt_k]) gradients[wrt_k] = dkv[0];
    if (wanted[wrt_v]) gradients[wrt_v] = dkv[1];
  }
  if (wanted[wrt_attn_mask]) {
    const mx::Shape& shape = call.optional.attn_mask->shape();
    const metal::Kernel kernel = metal::mask_gradient_kernel(problem, operands, {shape[0], shape[1], shape[2], shape[3]}, gpu);
    gradients[wrt_attn_mask] = launch(kernel, inputs, {shape}, mx::float32)[0];
  }
  if (wanted[wrt_learnable_sink]) gradients[wrt_learnable_sink] = sink_gradient(call, lse, delta);
  return gradients;
}

/// The call with some of its differentiable arrays replaced.
AttentionCall with_arrays(AttentionCall call, WantedGradients which, const Arrays& arrays) {
  auto next = arrays.begin();
  if (which[wrt_q]) call.q = *next++;
  if (which[wrt_k]) call.k = *next++;
  if (which[wrt_v]) call.v = *next++;
  if (which[wrt_attn_mask]) call.optional.attn_mask = *next++;
  if (which[wrt_learnable_sink]) call.optional.learnable_sink = *next++;
  return call;
}

GradientSet backward_by_reference(const AttentionCall& call, const AttentionCotangents& cotangents, WantedGradients wanted) {
  const GradientSet differentiable = {call.q, call.k, call.v, call.optional.attn_mask, call.optional.learnable_sink};
  Arrays primals;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i]) primals.push_back(*differentiable[i]);
  }
  const auto forward = [&](const Arrays& arrays) {
    const auto [out, lse] = reference_forward(with_arrays(call, wanted, arrays));
    return Arrays{out, lse};
  };
  const Arrays arrays = mx::vjp(forward, primals, {cotangents.dout, cotangents.dlse}).second;
  GradientSet gradients;
  auto next = arrays.begin();
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i]) gradients[i] = *next++;
  }
  return gradients;
}

Probe forward_probe(const AttentionCall& call) {
  const auto both = [](const AttentionOutputs& outputs) { return Arrays{outputs.out, outputs.lse}; };
  const bool splits = metal::is_decoded(call.problem) && metal::decode_splits(call.problem, metal_gpu()) > 1;
  const auto small = [call, splits] {
    AttentionCall result = small_call_like(call);
    result.problem.num_splits = splits ? 2 : 1;
    return result;
  };
  return {.texts = metal_kernel_of(call).name + address_spaces(node_inputs(call)),
          .by_kernel = [=] { return both(forward_by_kernel(small())); },
          .by_reference = [=] { return both(reference_forward(small())); }};
}

Probe backward_probe(const AttentionCall& call, const AttentionCotangents& cotangents, WantedGradients wanted) {
  const auto gradients_of = [call](auto backward) {
    const AttentionCall small = small_call_like(call);
    const AttentionOutputs outputs = reference_forward(small);
    // Any cotangents do; these differ from element to element.
    const AttentionCotangents cotangents = {mx::sin(mx::multiply(outputs.out, mx::array(7.0f, outputs.out.dtype()))),
                                            mx::where(mx::isfinite(outputs.lse), mx::cos(outputs.lse), mx::array(0.0f))};
    Arrays arrays;
    for (auto& gradient : backward(small, outputs, cotangents)) {
      if (gradient) arrays.push_back(*gradient);
    }
    return arrays;
  };
  Arrays inputs = node_inputs(call);
  inputs.insert(inputs.end(), {cotangents.dout, cotangents.dlse});
  const metal::Kernel kernel = metal::backward_dkv_kernel(call.problem, metal_operands(call), metal_gpu());
  return {.texts = kernel.name + wanted.to_string() + address_spaces(inputs),
          .by_kernel =
              [=] {
                return gradients_of(
                    [wanted](const AttentionCall& small, const AttentionOutputs& outputs, const AttentionCotangents& of_small) {
                      return backward_by_kernels(small, outputs, of_small, wanted);
                    });
              },
          .by_reference =
              [=] {
                return gradients_of(
                    [wanted](const AttentionCall& small, const AttentionOutputs&, const AttentionCotangents& of_small) {
                      return backward_by_reference(small, of_small, wanted);
                    });
              }};
}

}  // namespace

AttentionOutputs metal_attention(const AttentionCall& call) {
  if (is_empty(call) || !is_trusted(forward_probe(call), call.stream)) return reference_forward(call);
  return forward_by_kernel(call);
}

GradientSet metal_backward(const AttentionCall& call, const AttentionOutputs& outputs, const AttentionCotangents& cotangents,
                           WantedGradients wanted) {
  if (!is_trusted(backward_probe(call, cotangents, wanted), call.stream))
    return backward_by_reference(call, cotangents, wanted);
  return backward_by_kernels(call, outputs, cotangents, wanted);
}

}  // namespace flash_attn
