// From a call to the text, the numbers and the grid of each kernel that computes it.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "attention_problem.h"
#include "metal/kernel.h"

namespace flash_attn::metal {

/// An array that a kernel reads besides its params, as the text names and types it.
struct Operand {
  std::string name;
  std::string type;  // of its elements, in Metal's words
};

/// What a problem does not say: which arrays there are, in the kernels' order (q, k, v, then the optional ones).
struct Operands {
  std::vector<Operand> arrays;
  bool alibi_per_sequence = false;
  int k_code_bits = 0;  // in a cache: 0 not quantised, else 8 or 4
  int v_code_bits = 0;
  bool codes_are_affine = false;

  const Operand* find(const std::string& name) const;
};

/// The GPU, as far as tile shapes depend on it.
struct Gpu {
  int generation = 0;     // 13: M1, 14: M2, ... 0: unknown, which gets what runs well everywhere
  int threadgroups = 64;  // so many keep it busy
};

Kernel forward_kernel(const AttentionProblem& problem, const Operands& operands, Gpu gpu);

/// D of the backward: rowsum(dO o O) - dLSE. Inputs out, dout, dlse.
Kernel delta_kernel(const AttentionProblem& problem, const Operands& operands);

/// Inputs of the forward, then dout, lse, delta.
Kernel backward_dq_kernel(const AttentionProblem& problem, const Operands& operands, Gpu gpu);
Kernel backward_dkv_kernel(const AttentionProblem& problem, const Operands& operands, Gpu gpu);

/// `shape` is the mask's own: axes of 1 are summed over.
Kernel mask_gradient_kernel(const AttentionProblem& problem, const Operands& operands, const std::array<int, 4>& shape,
                            Gpu gpu);

// ---- few rows over many keys

/// Whether decode computes the call rather than forward.
bool is_decoded(const AttentionProblem& problem);

/// Runs into which each sequence's keys are divided: what num_splits asks for, or as many as keep the GPU busy.
int decode_splits(const AttentionProblem& problem, Gpu gpu);

/// Outputs out and lse; of several splits out_partial [splits, rows, heads, head_dim_v] and lse_partial, both float32.
Kernel decode_kernel(const AttentionProblem& problem, const Operands& operands, int splits);

/// From out_partial and lse_partial to out and lse.
Kernel combine_kernel(const AttentionProblem& problem, const Operands& operands, int splits);

/// Rotated queries or new keys: inputs x, rotary_base (batch,), rotary_cos, rotary_sin, and token_starts where x is packed.
enum class Rotated { queries, new_keys };
Kernel rotary_kernel(const AttentionProblem& problem, Rotated rotated, bool packed);

}  // namespace flash_attn::metal
