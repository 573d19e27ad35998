#include "ops/normalise.h"

#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "mlx/ops.h"
#include "ops/dtype.h"
#include "ops/inputs.h"

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
  optional.seqused_k = options.seqused_k;
  if (options.dropout_p > 0.0) optional.dropout_key = options.dropout_key;
}

/// `optional` and the problem's varlen and max_seqlen are set; fills in and checks the rest.
AttentionCall normalise(AttentionProblem problem, const mx::array& q, const mx::array& k, const mx::array& v,
                        OptionalInputs optional, const AttentionOptions& options) {
  const mx::Stream stream = mx::to_stream(options.stream);
  problem.dtype = dtype_of(q);
  set_sizes(problem, q, k, v, optional);
  check_options(problem, options, q, v);
  check_used("seqused_q", options.seqused_q, optional.cu_seqlens_q, problem.max_seqlen_q);
  check_used("seqused_k", options.seqused_k, optional.cu_seqlens_k, problem.max_seqlen_k);
  set_features(problem, options);
  take_options(optional, options, stream);
  if (!options.qv) return {problem, q, k, v, std::move(optional), stream};

  problem.head_dim += problem.head_dim_v;
  return {problem, mx::concatenate({q, *options.qv}, -1, stream), mx::concatenate({k, v}, -1, stream), v, std::move(optional),
          stream};
}

}  // namespace

AttentionCall dense_call(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options,
                         const ArgumentNames& names) {
  check_tensors(q, k, v, /*varlen=*/false, names);
  return normalise(AttentionProblem{}, q, k, v, OptionalInputs{}, options);
}

AttentionCall varlen_call(const mx::array& q, const mx::array& k, const mx::array& v, const mx::array& cu_seqlens_q,
                          const mx::array& cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, const AttentionOptions& options,
                          const ArgumentNames& names) {
  check_tensors(q, k, v, /*varlen=*/true, names);
  check_packing({cu_seqlens_q, max_seqlen_q, q.shape(0)}, {cu_seqlens_k, max_seqlen_k, k.shape(0)}, names);
  AttentionProblem problem;
  problem.varlen = true;
  problem.max_seqlen_q = max_seqlen_q;
  problem.max_seqlen_k = max_seqlen_k;
  OptionalInputs optional;
  optional.cu_seqlens_q = cu_seqlens_q;
  optional.cu_seqlens_k = cu_seqlens_k;
  return normalise(problem, q, k, v, std::move(optional), options);
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
