// A call with its buffers. Each buffer is an exact-size heap allocation, so that AddressSanitizer sees any access outside;
// every element that the call must not use is NaN, in inputs before the call and in outputs until they are written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
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
};

class TestCall {
 public:
  TestCall(const AttentionProblem& problem, const Features& features, std::uint64_t seed);

  AttentionProblem problem;
  cpu::AttentionInputs inputs;
  cpu::ForwardOutputs outputs;
  cpu::BackwardInputs saved;  // out and lse are the reference's; see save_reference
  cpu::Gradients gradients;

  /// Rounds the reference's result into `saved`.
  void save_reference(const ReferenceForward& reference);

  /// Writable views of the inputs, for tests that change a value.
  cpu::Tensor q, k, v;
  cpu::MaskTensor attn_mask;
  float* sink = nullptr;

 private:
  struct Shape {
    std::int64_t batch, seq, heads, dim;
  };
  struct Buffer {
    std::unique_ptr<std::byte[]> bytes;
    std::size_t size;
  };

  std::byte* allocate(std::int64_t elements, DType dtype);
  cpu::Tensor make_tensor(const Shape& shape, Layout layout, DType dtype);
  template <class T>
  const T* copy_small(const std::vector<T>& values);
  void make_mask(const Features& features);
  void fill_used(const Features& features, std::uint64_t seed);

  std::vector<Buffer> buffers_;
};

/// Dropout as the ops normalise it.
void set_dropout(AttentionProblem& problem, double p);

/// A description of the first element out of tolerance; empty when all agree.
std::string compare_forward(const TestCall& call, const ReferenceForward& reference);
std::string compare_gradients(const TestCall& call, const ReferenceGradients& reference);

/// Runs the kernels on `call` and compares: forward, then backward from the reference's output.
std::string check_forward(TestCall& call);
std::string check_backward(TestCall& call);

}  // namespace flash_attn::test
