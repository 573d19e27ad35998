// Evaluated arrays as the CPU kernels see them: pointers and strides, nothing copied.
#pragma once

#include "cpu/attention.h"
#include "ops/call/call.h"

namespace flash_attn {

/// q, k, v, out or a gradient of one: (batch, seq, heads, dim), packed sequences without batch.
cpu::ConstTensor const_view(const mx::array& tensor);
cpu::Tensor view(mx::array& tensor);

/// The same of an array that a kernel is about to fill.
cpu::Tensor result_view(mx::array& result);

/// lse or its cotangent: (batch, heads, seq), packed sequences (heads, total).
cpu::LseStrides lse_strides(const mx::array& lse);

cpu::AttentionInputs cpu_inputs(const AttentionCall& call);

/// What an append needs besides; the call's k and v (and their scales and biases) are then the arrays to write.
cpu::NewKeys new_keys(const AttentionCall& call);
cpu::RotaryTable rotary_table(const AttentionCall& call);
cpu::WritableCache writable_cache(const AttentionCall& call);

}  // namespace flash_attn
