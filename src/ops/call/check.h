// Every check of an argument. An error names the argument, what it got and what it needs.
#pragma once

#include <optional>

#include "flash_attn/attention.h"
#include "ops/call/call.h"

namespace flash_attn {

/// What the caller calls the arguments: q is a part of `qkv` in the packed functions.
struct ArgumentNames {
  const char* q = "q";
  const char* k = "k";
  const char* v = "v";
  const char* cu_seqlens_q = "cu_seqlens_q";
  const char* cu_seqlens_k = "cu_seqlens_k";
  const char* max_seqlen_q = "max_seqlen_q";
  const char* max_seqlen_k = "max_seqlen_k";
  const char* k_new = "k";
  const char* v_new = "v";
};

/// qkv or kv: `rank` axes, `parts` of them along the third last.
void check_packed(const char* name, const mx::array& packed, int rank, int parts);

/// Rank, dtype and sizes of q, k and v.
void check_tensors(const mx::array& q, const mx::array& k, const mx::array& v, bool varlen, const ArgumentNames& names = {},
                   int head_dim_limit = max_head_dim_of_tensor);

/// Where packed sequences lie, and how long they may be.
struct Packing {
  const mx::array& cu_seqlens;
  int max_seqlen;
  int total;  // rows there are
};

/// One side of packed sequences; values only where that forces no evaluation.
void check_packing_of(const char* name, const char* max_name, const Packing& packing);

/// Both sides.
void check_packing(const Packing& q, const Packing& k, const ArgumentNames& names);

/// Everything in `options`, against the sizes of `problem`.
void check_options(const AttentionProblem& problem, const AttentionOptions& options, const mx::array& q);

/// The values of seqused, where that forces no evaluation: `slots` is cu_seqlens of packed sequences.
void check_used(const char* name, const std::optional<mx::array>& used, const std::optional<mx::array>& slots, int max_seqlen);

/// The shapes of a normalised call, once more: mx.compile(shapeless=True) replaces arrays behind a node.
void check_shapes(const AttentionCall& call);

void check_partials(const mx::array& out_partial, const mx::array& lse_partial, const std::optional<mx::Dtype>& out_dtype);

}  // namespace flash_attn
