#include "ops/cpu_views.h"

#include "ops/dtype.h"

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

}  // namespace

cpu::ConstTensor const_view(const mx::array& tensor) { return {tensor.data<void>(), dtype_of(tensor), strides_of(tensor)}; }

cpu::Tensor view(mx::array& tensor) { return {tensor.data<void>(), dtype_of(tensor), strides_of(tensor)}; }

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
  return inputs;
}

}  // namespace flash_attn
