// The CPU backend: what a caller hands over, and the passes it can ask for. Knows no framework.
//
// Sizes in elements. A dense tensor is [batch, seq, heads, dim] in any strides (a view is read in place); a varlen tensor has
// no batch axis and its sequences start where cu_seqlens says. No input makes a kernel read or write outside the buffers:
// lengths are clamped to what exists.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention_problem.h"

namespace flash_attn::cpu {

struct Strides {
  std::int64_t batch = 0;
  std::int64_t seq = 0;
  std::int64_t head = 0;
  std::int64_t dim = 1;
};

struct ConstTensor {
  const void* data = nullptr;
  DType dtype = DType::float32;
  Strides strides;
};

/// Whether a row's heads lie side by side, and not a head's rows.
static inline bool heads_are_inner(const ConstTensor& tensor) {
  const auto distance = [](std::int64_t stride) { return stride < 0 ? -stride : stride; };
  return distance(tensor.strides.head) <= distance(tensor.strides.seq);
}

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::float32;
  Strides strides;
  bool streamed = false;  // written past the caches, see is_large
};

/// lse and its cotangent: natural log, float32, dense [batch, heads_q, seq], varlen [heads_q, total_q].
struct LseStrides {
  std::int64_t batch = 0;
  std::int64_t head = 0;
  std::int64_t seq = 1;
};

/// [batch, heads_q, max_seqlen_q, max_seqlen_k]; stride 0 where the caller's array is broadcast. Boolean (true: visible) or
/// added to the score.
struct MaskTensor {
  const void* data = nullptr;  // null: no mask
  DType dtype = DType::boolean;
  std::int64_t batch = 0;
  std::int64_t head = 0;
  std::int64_t row = 0;
  std::int64_t key = 0;
};

/// What turns the codes of a quantised tensor into numbers. int8: a float32 scale a row of a head. affine8, affine4: a scale
/// and a bias per group of head dims, in `dtype`; the tensor's own strides count 32-bit words.
template <class Pointer>
struct QuantizationOf {
  Pointer scales = nullptr;  // null: not quantised
  Pointer biases = nullptr;
  DType dtype = DType::float32;
  Strides scale_strides, bias_strides;  // dim: from group to group
};
using ConstQuantization = QuantizationOf<const void*>;
using Quantization = QuantizationOf<void*>;

/// Where a cache keeps the keys of a sequence. Null where the call does not use them; contiguous.
struct KeyCache {
  const std::int32_t* block_table = nullptr;     // [table_rows, table_blocks]
  const std::int32_t* batch_idx = nullptr;       // [batch]: row of the cache, or of the table
  const std::int32_t* leftpad = nullptr;         // [batch]: slots before the first key
  const std::int32_t* cu_seqlens_new = nullptr;  // [batch + 1]: packed new keys
  ConstQuantization k, v;
};

struct AttentionInputs {
  ConstTensor q, k, v;
  ConstTensor qv;  // null: none. As q, with v's head dim
  MaskTensor attn_mask;
  KeyCache cache;

  // Small arrays, contiguous; null where the call does not use them.
  const float* alibi_slopes = nullptr;  // [heads_q], or [batch, heads_q] with alibi_batch_stride = heads_q
  std::int64_t alibi_batch_stride = 0;
  const float* learnable_sink = nullptr;       // [heads_q]
  const std::int32_t* cu_seqlens_q = nullptr;  // [batch + 1], varlen
  const std::int32_t* cu_seqlens_k = nullptr;
  const std::int32_t* seqused_q = nullptr;     // [batch]
  const std::int32_t* seqused_k = nullptr;     // with a cache: the keys in it before new ones are appended
  const std::uint32_t* dropout_key = nullptr;  // [2]
};

/// New keys of every sequence, [batch, seqlen_new, heads_k, dim], or packed as KeyCache::cu_seqlens_new says.
struct NewKeys {
  ConstTensor k, v;
};

/// cos and sin of the angles, [rotary_rows, rotary_dim / 2], last axis contiguous.
struct RotaryTable {
  const void* cos = nullptr;  // null: no rotation
  const void* sin = nullptr;
  DType dtype = DType::float32;
  std::int64_t cos_stride = 0;  // from row to row
  std::int64_t sin_stride = 0;
  const std::int32_t* seqlens = nullptr;  // [batch]: the angle table's row of a sequence's first new token; null: seqused_k
};

/// The cache as an append writes it: AttentionInputs' k and v.
struct WritableCache {
  Tensor k, v;
  Quantization k_quantization, v_quantization;
};

/// out and lse are written everywhere: rows that belong to no sequence get 0 and -inf.
struct ForwardOutputs {
  Tensor out;
  float* lse = nullptr;
  LseStrides lse_strides;
};

/// What backward reads besides the inputs.
struct BackwardInputs {
  ConstTensor out, dout;
  const float* lse = nullptr;
  LseStrides lse_strides;
  const float* dlse = nullptr;  // null: zero
  LseStrides dlse_strides;
};

/// Written everywhere, zero where no gradient flows. dq, dk, dv have the problem's dtype; null data: that gradient is not
/// wanted. Bitwise the same on every run and for every number of threads.
struct Gradients {
  Tensor dq, dk, dv;
  float* dsink = nullptr;  // [heads_q]
  // [mask_batch, mask_heads, mask_rows, mask_keys] contiguous float32, each either 1 (broadcast) or the problem's size.
  float* dmask = nullptr;
  std::int32_t dmask_batch = 1, dmask_heads = 1, dmask_rows = 1, dmask_keys = 1;
};

/// FlashAttention-2 forward: out = softmax(mask(scale q k^T)) v, O(seq) memory.
void forward(const AttentionProblem& problem, const AttentionInputs& inputs, const ForwardOutputs& outputs);

/// Writes the new keys, rotated, and values behind what each sequence has. A slot past the capacity or on a page that does not
/// exist is dropped.
void append(const AttentionProblem& problem, const AttentionInputs& inputs, const NewKeys& new_keys, const RotaryTable& rotary,
            const WritableCache& cache);

/// `rotated` = q, rotated and rounded to q's dtype.
void rotate_queries(const AttentionProblem& problem, const AttentionInputs& inputs, const RotaryTable& rotary,
                    const Tensor& rotated);

/// FlashAttention-2 backward from (out, lse); recomputes the scores block by block.
void backward(const AttentionProblem& problem, const AttentionInputs& inputs, const BackwardInputs& saved,
              const Gradients& gradients);

}  // namespace flash_attn::cpu
