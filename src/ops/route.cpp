#include "ops/route.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "ops/call/inputs.h"
#include "ops/call/require.h"
#include "ops/env.h"
#include "ops/metal/launch.h"
#include "ops/warn.h"

namespace flash_attn {
namespace {

bool is_traced(const AttentionCall& call) {
  const std::vector<mx::array> inputs = node_inputs(call);
  return std::any_of(inputs.begin(), inputs.end(), [](const mx::array& input) { return input.is_tracer(); });
}

/// Empty where the Metal kernels take the call.
std::string why_not_metal_kernel(const AttentionProblem& problem) {
  // Beyond it O and Q of eight rows no longer fit into the registers of two simdgroups.
  constexpr int largest_head_dim = 256;
  const int head_dim = std::max(problem.head_dim, problem.head_dim_v);
  if (problem.cached || head_dim <= largest_head_dim) return {};
  return text("head dim ", head_dim, ": the Metal kernels of training and prefill take at most ", largest_head_dim);
}

}  // namespace

std::string why_not_sdpa(const AttentionCall& call, const AttentionOptions& options) {
  const AttentionProblem& problem = call.problem;
  const OptionalInputs& optional = call.optional;
  struct Obstacle {
    bool present;
    const char* why;
  };
  const Obstacle obstacles[] = {
      {problem.cached, "keys in pages or in a cache: MLX's SDPA has none"},
      {problem.varlen, "packed sequences: MLX's SDPA takes dense batches"},
      {problem.batch == 0 || problem.max_seqlen_q == 0 || problem.max_seqlen_k == 0, "an empty tensor"},
      {problem.causal && problem.max_seqlen_q > problem.max_seqlen_k,
       "causal with seqlen_q > seqlen_k: rows without a key give NaN"},
      {problem.window_left >= 0 || (problem.window_right >= 0 && !problem.causal), "a window: MLX's SDPA has none"},
      {problem.attention_chunk > 0, "attention_chunk: MLX's SDPA has none"},
      {optional.attn_mask.has_value(), "attn_mask: a row that it hides wholly gives NaN"},
      {optional.seqused_q || optional.seqused_k, "seqused: MLX's SDPA has none"},
      {problem.softcap > 0.0f, "softcap: MLX's SDPA has none"},
      {optional.alibi_slopes.has_value(), "alibi_slopes: as an additive mask they take O(N^2) memory"},
      {problem.has_dropout, "dropout: MLX's SDPA has none"},
      {options.qv.has_value(), "qv: MLX's SDPA has none"},
      {options.return_softmax_lse || options.return_attn_probs, "the LSE is wanted: MLX's SDPA does not give it"},
  };
  for (const Obstacle& obstacle : obstacles) {
    if (obstacle.present) return obstacle.why;
  }
  return {};
}

namespace {

Route metal_route(const AttentionCall& call, const AttentionOptions& options, env::RouteWish wish) {
  using Target = Route::Target;
  const std::string no_kernel = why_not_metal_kernel(call.problem);
  if (wish == env::RouteWish::kernel) {
    if (!no_kernel.empty()) throw std::invalid_argument("[flash_attn] FLASH_ATTENTION_MLX_ROUTE=kernel: " + no_kernel);
    return {Target::kernel, "FLASH_ATTENTION_MLX_ROUTE=kernel"};
  }
  const std::string no_sdpa = why_not_sdpa(call, options);
  if (no_sdpa.empty() && !is_traced(call)) return {Target::sdpa, "MLX's SDPA is fused on Metal and computes the same"};
  const std::string no_sdpa_here = no_sdpa.empty() ? "under a transformation the LSE may be wanted" : no_sdpa;
  if (!no_kernel.empty()) return {Target::reference, no_kernel + ", and MLX's SDPA cannot: " + no_sdpa_here};
  return {Target::kernel, no_sdpa_here};
}

}  // namespace

Route choose_route(const AttentionCall& call, const AttentionOptions& options) {
  using Target = Route::Target;
  if (env::force_reference()) return {Target::reference, "FLASH_ATTENTION_MLX_REF=1"};
  const env::RouteWish wish = env::route_wish();
  const bool on_gpu = call.stream.device == mx::Device::gpu;

  if (wish == env::RouteWish::sdpa) {
    if (const std::string obstacle = why_not_sdpa(call, options); !obstacle.empty()) {
      throw std::invalid_argument("[flash_attn] FLASH_ATTENTION_MLX_ROUTE=sdpa cannot take this call: " + obstacle);
    }
    return {Target::sdpa, "FLASH_ATTENTION_MLX_ROUTE=sdpa"};
  }
  if (runs_on_metal(call.stream)) return metal_route(call, options, wish);
  if (!on_gpu) return {Target::kernel, "on the CPU MLX's SDPA is unfused and slower at every shape"};

  const std::string no_kernel = "no kernel for the GPU is in this build";
  if (wish == env::RouteWish::kernel)
    throw std::invalid_argument("[flash_attn] FLASH_ATTENTION_MLX_ROUTE=kernel: " + no_kernel);
  if (const std::string obstacle = why_not_sdpa(call, options); !obstacle.empty()) {
    return {Target::reference, no_kernel + ", and MLX's SDPA cannot: " + obstacle};
  }
  if (is_traced(call)) return {Target::reference, no_kernel + ", and under a transformation the LSE may be wanted"};
  return {Target::sdpa, no_kernel + "; MLX's SDPA computes the same"};
}

Route take_route(const AttentionCall& call, const AttentionOptions& options) {
  Route route = choose_route(call, options);
  if (route.target == Route::Target::reference && !env::force_reference()) {
    warn_once("[flash_attn] " + route.why +
              ". MLX ops compute this call in O(seqlen_q * seqlen_k) memory; stream=mx.cpu runs " + "the fused CPU kernel");
  }
  return route;
}

}  // namespace flash_attn
