// A call with its buffers. Each buffer is an exact-size heap allocation, so that AddressSanitizer sees any access outside;
// every element that the call must not use is NaN, in inputs before the call and in outputs until they are written. Codes,
// which cannot be NaN, have NaN as their scale.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "scalar_reference.h"

namespace flash_attn::test {

enum class Layout {
  contiguous,   // [batch, seq, heads, dim]
  heads_first,  // [batch, heads, seq, dim], transposed
  packed,       // one of three in [batch, seq, 3, heads, dim]
  gaps,         // unused elements after each row of dim
  strided_dim,  // every second element
  reversed,     // seq runs backwards
  same_batch,   // batch items share memory; inputs only
  streamed,     // contiguous, at a cache line, written past the caches; outputs only
};

// Of a call whose problem is `cached`. Empty: not given.
struct CacheFeatures {
  std::vector<std::int32_t> block_table;  // [table_rows, table_blocks]
  std::vector<std::int32_t> batch_idx, leftpad, cu_seqlens_new, rotary_seqlens;
  std::optional<DType> k_codes, v_codes;  // none: k and v have the problem's dtype
  DType scale_dtype = DType::float32;     // of affine codes
  Layout new_keys = Layout::contiguous;
};

struct Features {
  Layout q = Layout::contiguous;
  Layout k = Layout::contiguous;
  Layout v = Layout::contiguous;
  Layout out = Layout::contiguous;  // of dout and the gradients too
  bool alibi = false;
  bool alibi_per_batch = false;
  bool sink = false;
  bool dlse = false;
  bool attn_mask = false;
  DType mask_dtype = DType::boolean;
  // False: the mask has size 1 there.
  bool mask_batch = true, mask_heads = true, mask_rows = true, mask_keys = true;
  // Empty: not given.
  std::vector<std::int32_t> cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k;
  double magnitude = 1.0;  // of q and k
  CacheFeatures cache;
};

class TestCall {
 public:
  TestCall(const AttentionProblem& problem, const Features& features, std::uint64_t seed);

  AttentionProblem problem;
  cpu::AttentionInputs inputs;
  cpu::ForwardOutputs outputs;
  cpu::BackwardInputs saved;  // out and lse are the reference's; see save_reference
  cpu::Gradients gradients;

  // Of a call with a cache. New keys wait in `new_keys` for an append; until then their slots are NaN.
  cpu::NewKeys new_keys;
  cpu::RotaryTable rotary;
  cpu::WritableCache cache;
  cpu::Tensor rotated;  // queries

  /// Rounds the reference's result into `saved`.
  void save_reference(const ReferenceForward& reference);

  /// All memory that the call can reach.
  struct Buffer {
    std::unique_ptr<std::byte[]> bytes;
    std::size_t size;
  };
  const std::vector<Buffer>& buffers() const { return buffers_; }

  /// Writable views of the inputs, for tests that change a value.
  cpu::Tensor q, k, v;
  cpu::MaskTensor attn_mask;
  float* sink = nullptr;

 private:
  struct Shape {
    std::int64_t batch, seq, heads, dim;
  };

  std::byte* allocate(std::int64_t elements, DType dtype);
  cpu::Tensor make_tensor(const Shape& shape, Layout layout, DType dtype);
  template <class T>
  const T* copy_small(const std::vector<T>& values) {
    static_assert(sizeof(T) == 4);
    auto* data = reinterpret_cast<T*>(allocate(static_cast<std::int64_t>(values.size()), DType::float32));
    std::copy(values.begin(), values.end(), data);
    return data;
  }
  void make_mask(const Features& features);
  cpu::Quantization make_scales(const Shape& cache, DType codes, DType scale_dtype);
  void make_cache(const Features& features);
  void fill_key(const KeyPlace& place, std::int64_t head, double magnitude, std::uint64_t seed);
  void fill_new_keys(std::uint64_t seed);
  void fill_angles(std::uint64_t seed);
  void fill_used(const Features& features, std::uint64_t seed);

  std::vector<Buffer> buffers_;
};

/// Dropout as the ops normalise it.
void set_dropout(AttentionProblem& problem, double p);

/// A description of the first element out of tolerance; empty when all agree.
std::string compare_forward(const TestCall& call, const ReferenceForward& reference);
std::string compare_gradients(const TestCall& call, const ReferenceGradients& reference);

/// An append, then the rotation of queries. Also: no byte beside the new slots changes, and no other buffer.
std::string check_append(TestCall& call);
std::string check_rotated_queries(TestCall& call);
/// All that a step of decoding does: append and rotation where the call has them, then forward of the rotated queries.
std::string check_cached(TestCall& call);

/// Runs the kernels on `call` and compares: forward, then backward from the reference's output.
std::string check_forward(TestCall& call);
std::string check_backward(TestCall& call);

}  // namespace flash_attn::test
