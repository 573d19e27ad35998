#include "ops/graph/cpu_views.h"

#include "cpu/large_results.h"
#include "ops/call/dtype.h"

namespace flash_attn {
namespace {

cpu::Strides strides_of(const mx::array& tensor) {
  return {.batch = tensor.ndim() == 4 ? tensor.strides(0) : 0,
          .seq = tensor.strides(-3),
          .head = tensor.strides(-2),
          .dim = tensor.strides(-1)};
}

/// An axis of 1 is broadcast, whatever its stride says.
std::int64_t broadcast_stride(const mx::array& array, int axis) { return array.shape(axis) == 1 ? 0 : array.strides(axis); }

cpu::MaskTensor mask_view(const mx::array& mask) {
  return {.data = mask.data<void>(),
          .dtype = dtype_of(mask),
          .batch = broadcast_stride(mask, 0),
          .head = broadcast_stride(mask, 1),
          .row = broadcast_stride(mask, 2),
          .key = broadcast_stride(mask, 3)};
}

template <class T>
const T* data_or_null(const std::optional<mx::array>& array) {
  return array ? array->data<T>() : nullptr;
}

/// Codes of MLX's quantised triple are 32-bit words.
DType dtype_of_cache(const mx::array& tensor, int dim) {
  if (tensor.dtype() != mx::uint32) return dtype_of(tensor);
  return tensor.shape(-1) * 32 == dim * 8 ? DType::affine8 : DType::affine4;
}

template <class Quantization>
Quantization quantization_of(const std::optional<mx::array>& scales, const std::optional<mx::array>& biases) {
  Quantization quantization;
  if (!scales) return quantization;
  quantization.scales = const_cast<mx::array&>(*scales).data<void>();
  quantization.dtype = dtype_of(*scales);
  if (!biases) {  // one scale a row: no last axis
    quantization.scale_strides = {scales->strides(0), scales->strides(1), scales->strides(2), 0};
    return quantization;
  }
  quantization.scale_strides = strides_of(*scales);
  quantization.biases = const_cast<mx::array&>(*biases).data<void>();
  quantization.bias_strides = strides_of(*biases);
  return quantization;
}

}  // namespace

cpu::ConstTensor const_view(const mx::array& tensor) { return {tensor.data<void>(), dtype_of(tensor), strides_of(tensor)}; }

cpu::Tensor view(mx::array& tensor) { return {tensor.data<void>(), dtype_of(tensor), strides_of(tensor)}; }

cpu::Tensor result_view(mx::array& result) {
  cpu::Tensor tensor = view(result);
  tensor.streamed = cpu::is_large(result.nbytes());
  return tensor;
}

cpu::LseStrides lse_strides(const mx::array& lse) {
  return {.batch = lse.ndim() == 3 ? lse.strides(0) : 0, .head = lse.strides(-2), .seq = lse.strides(-1)};
}

cpu::AttentionInputs cpu_inputs(const AttentionCall& call) {
  const OptionalInputs& optional = call.optional;
  cpu::AttentionInputs inputs;
  inputs.q = const_view(call.q);
  inputs.k = const_view(call.k);
  inputs.v = const_view(call.v);
  if (optional.attn_mask) inputs.attn_mask = mask_view(*optional.attn_mask);
  inputs.alibi_slopes = data_or_null<float>(optional.alibi_slopes);
  if (optional.alibi_slopes && optional.alibi_slopes->ndim() == 2) inputs.alibi_batch_stride = call.problem.heads_q;
  inputs.learnable_sink = data_or_null<float>(optional.learnable_sink);
  inputs.cu_seqlens_q = data_or_null<std::int32_t>(optional.cu_seqlens_q);
  inputs.cu_seqlens_k = data_or_null<std::int32_t>(optional.cu_seqlens_k);
  inputs.seqused_q = data_or_null<std::int32_t>(optional.seqused_q);
  inputs.seqused_k = data_or_null<std::int32_t>(optional.seqused_k);
  inputs.dropout_key = data_or_null<std::uint32_t>(optional.dropout_key);
  if (!call.problem.cached) return inputs;

  inputs.k.dtype = dtype_of_cache(call.k, call.problem.head_dim);
  inputs.v.dtype = dtype_of_cache(call.v, call.problem.head_dim_v);
  if (optional.qv) inputs.qv = const_view(*optional.qv);
  inputs.cache.block_table = data_or_null<std::int32_t>(optional.block_table);
  inputs.cache.batch_idx = data_or_null<std::int32_t>(optional.cache_batch_idx);
  inputs.cache.leftpad = data_or_null<std::int32_t>(optional.cache_leftpad);
  inputs.cache.cu_seqlens_new = data_or_null<std::int32_t>(optional.cu_seqlens_k_new);
  inputs.cache.k = quantization_of<cpu::ConstQuantization>(optional.k_scales, optional.k_biases);
  inputs.cache.v = quantization_of<cpu::ConstQuantization>(optional.v_scales, optional.v_biases);
  return inputs;
}

cpu::NewKeys new_keys(const AttentionCall& call) {
  return {const_view(*call.optional.k_new), const_view(*call.optional.v_new)};
}

cpu::RotaryTable rotary_table(const AttentionCall& call) {
  const OptionalInputs& optional = call.optional;
  if (!optional.rotary_cos) return {};
  return {.cos = optional.rotary_cos->data<void>(),
          .sin = optional.rotary_sin->data<void>(),
          .dtype = dtype_of(*optional.rotary_cos),
          .cos_stride = optional.rotary_cos->shape(1),
          .sin_stride = optional.rotary_sin->shape(1),
          .seqlens = data_or_null<std::int32_t>(optional.rotary_seqlens)};
}

cpu::WritableCache writable_cache(const AttentionCall& call) {
  const cpu::AttentionInputs inputs = cpu_inputs(call);
  const OptionalInputs& optional = call.optional;
  return {.k = {const_cast<void*>(inputs.k.data), inputs.k.dtype, inputs.k.strides},
          .v = {const_cast<void*>(inputs.v.data), inputs.v.dtype, inputs.v.strides},
          .k_quantization = quantization_of<cpu::Quantization>(optional.k_scales, optional.k_biases),
          .v_quantization = quantization_of<cpu::Quantization>(optional.v_scales, optional.v_biases)};
}

}  // namespace flash_attn
