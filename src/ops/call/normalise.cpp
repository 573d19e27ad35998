#include "ops/call/normalise.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "mlx/ops.h"
#include "ops/call/check_kvcache.h"
#include "ops/call/dtype.h"
#include "ops/call/inputs.h"
#include "ops/call/require.h"

namespace flash_attn {
namespace {

void set_features(AttentionProblem& problem, const AttentionOptions& options) {
  // With qv the two dot products are one over the joined head dims.
  const int scored_dims = problem.head_dim + (options.qv ? problem.head_dim_v : 0);
  problem.softmax_scale = static_cast<float>(options.softmax_scale.value_or(1.0 / std::sqrt(scored_dims)));
  problem.softcap = static_cast<float>(options.softcap);
  problem.causal = options.causal;
  problem.window_left = options.window_size.first;
  problem.window_right = options.window_size.second;
  problem.attention_chunk = options.attention_chunk;
  problem.num_splits = options.num_splits;
  problem.has_dropout = options.dropout_p > 0.0;
  const double keep = 1.0 - options.dropout_p;
  problem.dropout_keep_24 = static_cast<std::uint32_t>(std::floor(keep * (1 << 24)));
  problem.dropout_scale = static_cast<float>(1.0 / keep);
}

/// Leading axes of 1 up to (batch, heads, seqlen_q, seqlen_k); nothing is expanded.
mx::array mask_of_rank_4(const mx::array& mask, mx::Stream stream) {
  std::vector<int> new_axes(4 - mask.ndim());
  std::iota(new_axes.begin(), new_axes.end(), 0);
  return new_axes.empty() ? mask : mx::expand_dims(mask, new_axes, stream);
}

void take_options(OptionalInputs& optional, const AttentionOptions& options, mx::Stream stream) {
  if (options.attn_mask) optional.attn_mask = mask_of_rank_4(*options.attn_mask, stream);
  if (options.learnable_sink) optional.learnable_sink = mx::astype(*options.learnable_sink, mx::float32, stream);
  optional.alibi_slopes = options.alibi_slopes;
  optional.seqused_q = options.seqused_q;
  if (options.dropout_p > 0.0) optional.dropout_key = options.dropout_key;
}

/// `optional` and the problem's varlen and max_seqlen are set; fills in and checks the rest.
AttentionCall normalise(AttentionProblem problem, const mx::array& q, const mx::array& k, const mx::array& v,
                        OptionalInputs optional, const AttentionOptions& options) {
  const mx::Stream stream = mx::to_stream(options.stream);
  problem.dtype = dtype_of(q);
  optional.seqused_k = options.seqused_k;
  set_sizes(problem, q, k, v, optional);
  check_options(problem, options, q);
  check_used("seqused_q", options.seqused_q, optional.cu_seqlens_q, problem.max_seqlen_q);
  check_used("seqused_k", options.seqused_k, optional.cu_seqlens_k, problem.max_seqlen_k);
  set_features(problem, options);
  take_options(optional, options, stream);
  if (!options.qv) return {problem, q, k, v, std::move(optional), stream};

  problem.head_dim += problem.head_dim_v;
  return {problem, mx::concatenate({q, *options.qv}, -1, stream), mx::concatenate({k, v}, -1, stream), v, std::move(optional),
          stream};
}

/// As normalise, for keys in a cache or in pages; `optional` has all that says where they are, `lengths_name` is what the
/// caller calls seqused_k.
AttentionCall normalise_cached(AttentionProblem problem, const mx::array& q, const mx::array& k, const mx::array& v,
                               OptionalInputs optional, const AttentionOptions& options, const ArgumentNames& names,
                               const char* lengths_name) {
  const mx::Stream stream = mx::to_stream(options.stream);
  check_cached_tensors(q, k, v, optional, problem.varlen, names);
  if (optional.block_table) require_rank("block_table", *optional.block_table, 2, "(batch, blocks)");
  problem.dtype = dtype_of(q);
  problem.cached = true;
  problem.has_qv = options.qv.has_value();
  optional.qv = options.qv;
  set_sizes(problem, q, k, v, optional);
  check_cache_layout(problem, optional, lengths_name);
  check_new_keys(problem, q, optional, names);
  check_options(problem, options, q);
  check_used("seqused_q", options.seqused_q, optional.cu_seqlens_q, problem.max_seqlen_q);
  check_cache_values(problem, optional, lengths_name);
  set_features(problem, options);
  take_options(optional, options, stream);
  return {problem, q, k, v, std::move(optional), stream};
}

}  // namespace

AttentionCall dense_call(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options,
                         const ArgumentNames& names) {
  if (options.block_table) {
    OptionalInputs optional;
    optional.block_table = options.block_table;
    optional.seqused_k = options.seqused_k;
    return normalise_cached(AttentionProblem{}, q, k, v, std::move(optional), options, names, "seqused_k");
  }
  check_tensors(q, k, v, /*varlen=*/false, names);
  return normalise(AttentionProblem{}, q, k, v, OptionalInputs{}, options);
}

namespace {

/// Lengths come from cu_seqlens_k, unless seqused_k says them.
AttentionCall paged_varlen_call(AttentionProblem problem, const mx::array& q, const mx::array& k, const mx::array& v,
                                const mx::array& cu_seqlens_k, OptionalInputs optional, const AttentionOptions& options,
                                const ArgumentNames& names) {
  require_rank(names.q, q, 3, "(total_q, heads, head_dim)");
  constexpr int no_packed_rows_to_end_in = std::numeric_limits<int>::max();
  check_packing({*optional.cu_seqlens_q, problem.max_seqlen_q, q.shape(0)},
                {cu_seqlens_k, problem.max_seqlen_k, no_packed_rows_to_end_in}, names);
  const mx::Stream stream = mx::to_stream(options.stream);
  const int batch = cu_seqlens_k.shape(0) - 1;
  optional.seqused_k = options.seqused_k;
  if (!optional.seqused_k) {
    optional.seqused_k =
        mx::subtract(mx::slice(cu_seqlens_k, {1}, {batch + 1}, stream), mx::slice(cu_seqlens_k, {0}, {batch}, stream), stream);
    // Four numbers a sequence: computed now where the starts are known, so that they can be checked.
    if (is_ready(cu_seqlens_k)) optional.seqused_k->eval();
  }
  return normalise_cached(problem, q, k, v, std::move(optional), options, names,
                          options.seqused_k ? "seqused_k" : names.cu_seqlens_k);
}

}  // namespace

AttentionCall varlen_call(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& cu_seqlens_q,
                          const mx::array& cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, const AttentionOptions& options,
                          const ArgumentNames& names) {
  AttentionProblem problem;
  problem.varlen = true;
  problem.max_seqlen_q = max_seqlen_q;
  problem.max_seqlen_k = max_seqlen_k;
  OptionalInputs optional;
  optional.cu_seqlens_q = cu_seqlens_q;
  if (options.block_table) {
    optional.block_table = options.block_table;
    return paged_varlen_call(problem, q, k, v, cu_seqlens_k, std::move(optional), options, names);
  }
  check_tensors(q, k, v, /*varlen=*/true, names);
  check_packing({cu_seqlens_q, max_seqlen_q, q.shape(0)}, {cu_seqlens_k, max_seqlen_k, k.shape(0)}, names);
  optional.cu_seqlens_k = cu_seqlens_k;
  return normalise(problem, q, k, v, std::move(optional), options);
}

AttentionCall kvcache_call(const mx::array& q, const CacheRef& k_cache, const CacheRef& v_cache,
                           const KVCacheArguments& arguments, const AttentionOptions& options, ArgumentNames names) {
  names.k = "k_cache";
  names.v = "v_cache";
  const auto copy_of = [](const mx::array* array) { return array ? std::optional(*array) : std::nullopt; };
  AttentionProblem problem;
  problem.max_seqlen_k = std::numeric_limits<int>::max();  // as much as the cache holds
  OptionalInputs optional;
  if (arguments.cu_seqlens_q) {
    problem.varlen = true;
    require_rank("q", q, 3, "(total_q, heads, head_dim)");
    problem.max_seqlen_q = arguments.max_seqlen_q.value_or(q.shape(0));
    check_packing_of("cu_seqlens_q", "max_seqlen_q", {*arguments.cu_seqlens_q, problem.max_seqlen_q, q.shape(0)});
    optional.cu_seqlens_q = arguments.cu_seqlens_q;
  }
  optional.seqused_k = arguments.cache_seqlens;
  optional.k_scales = copy_of(k_cache.scales);
  optional.k_biases = copy_of(k_cache.biases);
  optional.v_scales = copy_of(v_cache.scales);
  optional.v_biases = copy_of(v_cache.biases);
  optional.block_table = options.block_table;
  optional.cache_batch_idx = arguments.cache_batch_idx;
  optional.cache_leftpad = arguments.cache_leftpad;
  optional.k_new = arguments.k;
  optional.v_new = arguments.v;
  optional.cu_seqlens_k_new = arguments.cu_seqlens_k_new;
  optional.rotary_cos = arguments.rotary_cos;
  optional.rotary_sin = arguments.rotary_sin;
  optional.rotary_seqlens = arguments.rotary_seqlens;
  if (optional.k_new) require_rank(names.k_new, *optional.k_new, optional.cu_seqlens_k_new ? 3 : 4, "as q");
  if (optional.rotary_cos) {
    require_rank("rotary_cos", *optional.rotary_cos, 2, "(rows, rotary_dim / 2)");
    problem.rotary_dim = 2 * optional.rotary_cos->shape(1);
    problem.rotary_interleaved = arguments.rotary_interleaved;
  }
  return normalise_cached(problem, q, k_cache.data, v_cache.data, std::move(optional), options, names, "cache_seqlens");
}

mx::array unpack(const mx::array& packed, int index, mx::Stream stream) {
  const int axis = static_cast<int>(packed.ndim()) - 3;
  mx::Shape start(packed.ndim(), 0);
  mx::Shape stop = packed.shape();
  start[axis] = index;
  stop[axis] = index + 1;
  return mx::squeeze(mx::slice(packed, std::move(start), std::move(stop), stream), axis, stream);
}

}  // namespace flash_attn
