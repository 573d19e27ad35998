// The public functions: normalise, choose a route, add the nodes.
#include "flash_attn/attention.h"

#include "cpu/isa.h"
#include "mlx/fast.h"
#include "mlx/ops.h"
#include "ops/call/normalise.h"
#include "ops/graph/primitive.h"
#include "ops/metal/launch.h"
#include "ops/route.h"
#include "reference/kvcache.h"
#include "reference/reference.h"

namespace flash_attn {
namespace {

mx::array sdpa(const AttentionCall& call) {
  const auto heads_first = [&](const mx::array& tensor) { return mx::transpose(tensor, {0, 2, 1, 3}, call.stream); };
  std::optional<mx::array> sinks = call.optional.learnable_sink;
  if (sinks) sinks = mx::astype(*sinks, call.q.dtype(), call.stream);
  const mx::array out = mx::fast::scaled_dot_product_attention(heads_first(call.q), heads_first(call.k), heads_first(call.v),
                                                               call.problem.softmax_scale, call.problem.causal ? "causal" : "",
                                                               std::nullopt, sinks, /*force_fused=*/false, call.stream);
  return heads_first(out);
}

AttentionOutputs compute(const AttentionCall& call, Route::Target target) {
  switch (target) {
    case Route::Target::kernel:
      if (!runs_on_metal(call.stream))
        cpu::kernels();  // throws for an unknown FLASH_ATTENTION_MLX_ISA: an error of the call, not of its evaluation
      return attention_node(call);
    case Route::Target::sdpa:
      // The LSE that nobody asked for: lazy, so it costs nothing unless somebody reads it after all.
      return {sdpa(call), reference::attention(call).lse};
    case Route::Target::reference:
      break;
  }
  if (call.problem.cached) return reference::attention_over_cache(call);
  const reference::Result result = reference::attention(call);
  return {result.out, result.lse};
}

AttentionResult run(const AttentionCall& call, const AttentionOptions& options) {
  Route route = take_route(call, options);
  auto [out, lse] = compute(call, route.target);
  const bool wants_probabilities = options.return_attn_probs && call.problem.has_dropout;
  return {std::move(out), std::move(lse),
          wants_probabilities ? mx::stop_gradient(reference::attention(call).probabilities, call.stream)
                              : mx::array(std::initializer_list<int>{}, call.q.dtype()),
          std::move(route)};
}

}  // namespace

AttentionResult flash_attn_func(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options) {
  return run(dense_call(q, k, v, options), options);
}

AttentionResult flash_attn_qkvpacked_func(const mx::array& qkv, const AttentionOptions& options) {
  check_packed("qkv", qkv, 5, 3);
  const mx::Stream stream = mx::to_stream(options.stream);
  return run(dense_call(unpack(qkv, 0, stream), unpack(qkv, 1, stream), unpack(qkv, 2, stream), options,
                        {.q = "qkv", .k = "qkv", .v = "qkv"}),
             options);
}

AttentionResult flash_attn_kvpacked_func(const mx::array& q, const mx::array& kv, const AttentionOptions& options) {
  check_packed("kv", kv, 5, 2);
  const mx::Stream stream = mx::to_stream(options.stream);
  return run(dense_call(q, unpack(kv, 0, stream), unpack(kv, 1, stream), options, {.k = "kv", .v = "kv"}), options);
}

AttentionResult flash_attn_varlen_func(const mx::array& q, const mx::array& k, const mx::array& v,
                                       const mx::array& cu_seqlens_q, const mx::array& cu_seqlens_k, int max_seqlen_q,
                                       int max_seqlen_k, const AttentionOptions& options) {
  return run(varlen_call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options), options);
}

AttentionResult flash_attn_varlen_qkvpacked_func(const mx::array& qkv, const mx::array& cu_seqlens, int max_seqlen,
                                                 const AttentionOptions& options) {
  check_packed("qkv", qkv, 4, 3);
  const mx::Stream stream = mx::to_stream(options.stream);
  const ArgumentNames names = {.q = "qkv",
                               .k = "qkv",
                               .v = "qkv",
                               .cu_seqlens_q = "cu_seqlens",
                               .cu_seqlens_k = "cu_seqlens",
                               .max_seqlen_q = "max_seqlen",
                               .max_seqlen_k = "max_seqlen"};
  return run(varlen_call(unpack(qkv, 0, stream), unpack(qkv, 1, stream), unpack(qkv, 2, stream), cu_seqlens, cu_seqlens,
                         max_seqlen, max_seqlen, options, names),
             options);
}

AttentionResult flash_attn_varlen_kvpacked_func(const mx::array& q, const mx::array& kv, const mx::array& cu_seqlens_q,
                                                const mx::array& cu_seqlens_k, int max_seqlen_q, int max_seqlen_k,
                                                const AttentionOptions& options) {
  check_packed("kv", kv, 4, 2);
  const mx::Stream stream = mx::to_stream(options.stream);
  return run(varlen_call(q, unpack(kv, 0, stream), unpack(kv, 1, stream), cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                         max_seqlen_k, options, {.k = "kv", .v = "kv"}),
             options);
}

Route route(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options) {
  return choose_route(dense_call(q, k, v, options), options);
}

bool can_use_mlx_sdpa(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options) {
  return why_not_sdpa(dense_call(q, k, v, options), options).empty();
}

}  // namespace flash_attn
