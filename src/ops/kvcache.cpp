// The public functions over a KV cache.
#include "flash_attn/kvcache_attention.h"

#include <unordered_set>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "ops/call/check_kvcache.h"
#include "ops/call/inputs.h"
#include "ops/call/normalise.h"
#include "ops/call/require.h"
#include "ops/graph/kvcache_primitive.h"
#include "ops/route.h"
#include "reference/kvcache.h"

namespace flash_attn {
namespace {

/// True when an array is computed from a placeholder of a transformation, which has neither data nor a way to get any.
bool depends_on_placeholder(const mx::array& array) {
  std::vector<mx::array> waiting = {array};
  std::unordered_set<std::uintptr_t> seen;
  while (!waiting.empty()) {
    const mx::array next = std::move(waiting.back());
    waiting.pop_back();
    if (!seen.insert(next.id()).second) continue;
    if (!next.has_primitive() && !next.data_shared_ptr()) return true;
    waiting.insert(waiting.end(), next.inputs().begin(), next.inputs().end());
  }
  return false;
}

/// A cache from outside a traced function would be left referring to a placeholder of it.
void require_traced_together(const AttentionCall& call) {
  if (call.k.is_tracer() && call.v.is_tracer()) return;
  for (const mx::array& input : node_inputs(call)) {
    if (!input.is_tracer() || !depends_on_placeholder(input)) continue;
    fail<std::invalid_argument>("k_cache", "an array from outside the function that mx.compile or mx.vmap traces",
                                "the caches among the function's inputs, and returned by it, to be changed in place");
  }
}

void require_no_other_options(const AttentionOptions& options) {
  const auto refuse = [](bool given, const char* name) {
    if (given) fail<std::invalid_argument>(name, "a value", "none: it does not go with a KV cache");
  };
  refuse(options.dropout_p != 0.0, "dropout_p");
  refuse(options.attn_mask.has_value(), "attn_mask");
  refuse(options.seqused_q.has_value(), "seqused_q");
  refuse(options.seqused_k.has_value(), "seqused_k");
  refuse(options.return_attn_probs, "return_attn_probs");
}

std::vector<mx::array*> arrays_of(const CacheRef& cache) {
  std::vector<mx::array*> arrays = {&cache.data};
  if (cache.scales) arrays.push_back(cache.scales);
  if (cache.biases) arrays.push_back(cache.biases);
  return arrays;
}

/// The caller's arrays, in the order of cache_arrays.
std::vector<mx::array*> arrays_of(const CacheRef& k_cache, const CacheRef& v_cache) {
  std::vector<mx::array*> arrays = arrays_of(k_cache);
  for (mx::array* array : arrays_of(v_cache)) arrays.push_back(array);
  return arrays;
}

void require_separate(const CacheRef& k_cache, const CacheRef& v_cache) {
  if (&k_cache.data == &v_cache.data || k_cache.data.id() == v_cache.data.id()) {
    fail<std::invalid_argument>("v_cache", "the same array as k_cache",
                                "one of its own, since new keys and values are written");
  }
}

AttentionResult run(const AttentionCall& call, const CacheRef& k_cache, const CacheRef& v_cache,
                    const AttentionOptions& options) {
  const Route route = take_route(call, options);
  const mx::array no_probabilities(std::initializer_list<int>{}, call.q.dtype());
  const bool by_kernel = route.target == Route::Target::kernel;
  if (by_kernel) cpu::kernels();  // throws for an unknown FLASH_ATTENTION_MLX_ISA
  if (!call.optional.k_new) {
    if (by_kernel) {
      const AttentionOutputs outputs = attention_node(call);
      return {outputs.out, outputs.lse, no_probabilities, route};
    }
    const AttentionOutputs outputs = reference::attention_over_cache(call);
    return {outputs.out, outputs.lse, no_probabilities, route};
  }

  require_separate(k_cache, v_cache);
  require_traced_together(call);
  const KVCacheOutputs outputs = by_kernel ? kvcache_node(call) : reference::attention_with_kvcache(call);
  auto result = outputs.cache.begin();
  for (mx::array* array : arrays_of(k_cache, v_cache)) array->overwrite_descriptor(*result++);
  return {outputs.attention.out, outputs.attention.lse, no_probabilities, route};
}

}  // namespace

AttentionResult flash_attn_with_kvcache(const mx::array& q, const CacheRef& k_cache, const CacheRef& v_cache,
                                        const KVCacheArguments& arguments, const AttentionOptions& options) {
  require_no_other_options(options);
  return run(kvcache_call(q, k_cache, v_cache, arguments, options), k_cache, v_cache, options);
}

mx::array update_paged_kv_cache(const CacheRef& k_cache, const CacheRef& v_cache, const mx::array& new_k,
                                const mx::array& new_v, const mx::array& block_table, const mx::array& cache_seqlens,
                                mx::StreamOrDevice stream) {
  require_rank("new_k", new_k, 4, "(batch, seqlen_new, heads_k, dim)");
  require_rank("k_cache", k_cache.data, 4, "(pages, page_size, heads_k, dim)");
  require_rank("block_table", block_table, 2, "(batch, blocks)");
  // Attention of no query: what is left of the call is the append. Codes do not say what they stand for, new keys do.
  const mx::array& like = is_kernel_dtype(k_cache.data.dtype()) ? k_cache.data : new_k;
  const mx::array q = mx::zeros({block_table.shape(0), 0, k_cache.data.shape(2), like.shape(3)}, like.dtype(), stream);
  AttentionOptions options;
  options.block_table = block_table;
  options.stream = stream;
  KVCacheArguments arguments;
  arguments.k = new_k;
  arguments.v = new_v;
  arguments.cache_seqlens = cache_seqlens;
  const ArgumentNames names = {.k_new = "new_k", .v_new = "new_v"};
  run(kvcache_call(q, k_cache, v_cache, arguments, options, names), k_cache, v_cache, options);
  return mx::add(cache_seqlens, mx::array(new_k.shape(1), mx::int32), stream);
}

void validate_paged_kv_params(const mx::array& k_cache, const mx::array& v_cache, const mx::array& block_table,
                              const mx::array& cache_seqlens, int seqlen_new) {
  require_at_least("seqlen_new", seqlen_new, 0);
  mx::eval(block_table, cache_seqlens);
  check_pages(k_cache, v_cache, block_table, cache_seqlens, seqlen_new);
}

}  // namespace flash_attn
