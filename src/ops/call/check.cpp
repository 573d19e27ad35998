#include "ops/call/check.h"

#include <cstdint>
#include <string>
#include <vector>

#include "ops/call/check_kvcache.h"
#include "ops/call/require.h"

namespace flash_attn {
namespace {

void require_broadcastable(const std::string& argument, const mx::array& mask, const mx::Shape& scores) {
  const auto refuse = [&] {
    fail_shape(argument, mask, "a shape that broadcasts to (batch, heads, seqlen_q, seqlen_k) = " + text_of(scores));
  };
  if (mask.ndim() > scores.size()) refuse();
  for (int axis = 1; axis <= static_cast<int>(mask.ndim()); ++axis) {
    const int got = mask.shape(-axis);
    if (got != 1 && got != scores[scores.size() - axis]) refuse();
  }
}

mx::Shape scores_shape(const AttentionProblem& problem) {
  return {problem.batch, problem.heads_q, problem.max_seqlen_q, problem.max_seqlen_k};
}

void check_scalars(const AttentionOptions& options) {
  if (!(options.dropout_p >= 0.0 && options.dropout_p < 1.0)) {
    fail<std::invalid_argument>("dropout_p", options.dropout_p, "a number in [0, 1)");
  }
  if (options.softmax_scale) require_finite("softmax_scale", *options.softmax_scale);
  require_finite("softcap", options.softcap);
  if (options.softcap < 0.0) fail<std::invalid_argument>("softcap", options.softcap, "a number of at least 0");
  require_at_least("attention_chunk", options.attention_chunk, 0);
  require_at_least("num_splits", options.num_splits, 0);
}

void check_dropout_key(const AttentionOptions& options) {
  if (options.dropout_key) {
    require_dtype("dropout_key", *options.dropout_key, mx::uint32);
    require_shape("dropout_key", *options.dropout_key, {2}, "as mlx.core.random.key gives");
  } else if (options.dropout_p > 0.0) {
    fail<std::invalid_argument>("dropout_key", "none", "a uint32 array of shape (2,) when dropout_p > 0");
  }
}

void check_alibi_slopes(const AttentionProblem& problem, const mx::array& slopes) {
  require_dtype("alibi_slopes", slopes, mx::float32);
  const mx::Shape per_head = {problem.heads_q};
  const mx::Shape per_batch = {problem.batch, problem.heads_q};
  if (slopes.shape() != per_head && slopes.shape() != per_batch) {
    fail_shape("alibi_slopes", slopes,
               text("shape ", text_of(per_head), " (heads,) or ", text_of(per_batch), " (batch, heads)"));
  }
}

void check_attn_mask(const AttentionProblem& problem, const mx::array& mask) {
  if (mask.dtype() != mx::bool_ && !is_kernel_dtype(mask.dtype())) {
    fail<TypeError>("attn_mask", text("dtype ", mask.dtype()), "bool, float32, bfloat16 or float16");
  }
  require_broadcastable("attn_mask", mask, scores_shape(problem));
}

void check_qv(const mx::array& qv, const mx::array& q, int head_dim_v) {
  if (qv.dtype() != q.dtype()) fail<TypeError>("qv", text("dtype ", qv.dtype()), text("q's dtype ", q.dtype()));
  mx::Shape shape = q.shape();
  shape.back() = head_dim_v;
  require_shape("qv", qv, shape, "q's shape with head_dim_v");
}

void check_seqused(const AttentionProblem& problem, const char* name, const std::optional<mx::array>& used) {
  if (!used) return;
  require_dtype(name, *used, mx::int32);
  require_shape(name, *used, {problem.batch}, "(batch,)");
}

}  // namespace

void check_packed(const char* name, const mx::array& packed, int rank, int parts) {
  const std::string meaning = text(rank == 5 ? "(batch, seqlen, " : "(total, ", parts, ", heads, head_dim)");
  require_rank(name, packed, rank, meaning);
  if (packed.shape(-3) != parts) fail_shape(name, packed, meaning);
}

void check_tensors(const mx::array& q, const mx::array& k, const mx::array& v, bool varlen, const ArgumentNames& names,
                   int head_dim_limit) {
  const int rank = varlen ? 3 : 4;
  const std::string layout = varlen ? "(total, heads, head_dim)" : "(batch, seqlen, heads, head_dim)";
  require_rank(names.q, q, rank, layout);
  require_rank(names.k, k, rank, layout);
  require_rank(names.v, v, rank, layout);

  require_floating(names.q, q);
  for (const auto& [name, tensor] : {std::pair{names.k, k}, std::pair{names.v, v}}) {
    if (tensor.dtype() != q.dtype()) {
      fail<TypeError>(name, text("dtype ", tensor.dtype()), text("the dtype of ", names.q, ", ", q.dtype()));
    }
  }

  for (const auto& [name, tensor] : {std::pair{names.q, q}, std::pair{names.k, k}, std::pair{names.v, v}}) {
    if (tensor.shape(-1) < 1 || tensor.shape(-1) > head_dim_limit) {
      fail_shape(name, tensor, text("a head dim of 1 to ", head_dim_limit));
    }
    if (tensor.shape(-2) < 1) fail_shape(name, tensor, "at least one head");
  }
  if (!varlen && k.shape(0) != q.shape(0)) fail_shape(names.k, k, text("the batch size of ", names.q, ", ", q.shape(0)));
  if (k.shape(-1) != q.shape(-1)) fail_shape(names.k, k, text("the head dim of ", names.q, ", ", q.shape(-1)));
  mx::Shape values = k.shape();
  values.back() = v.shape(-1);
  require_shape(names.v, v, values, "as k but for its last axis");
  if (q.shape(-2) % k.shape(-2) != 0) {
    fail_shape(names.k, k, text("a number of heads that divides that of ", names.q, ", ", q.shape(-2)));
  }
}

void check_packing_of(const char* name, const char* max_name, const Packing& packing) {
  const auto& [cu_seqlens, max_seqlen, total] = packing;
  require_dtype(name, cu_seqlens, mx::int32);
  require_rank(name, cu_seqlens, 1, "(batch + 1,)");
  if (cu_seqlens.shape(0) < 1) fail_shape(name, cu_seqlens, "shape (batch + 1,)");
  require_at_least(max_name, max_seqlen, 0);

  const auto values = values_if_ready(cu_seqlens);
  if (!values) return;
  for (std::size_t i = 0; i < values->size(); ++i) {
    const std::int64_t previous = i ? values->at(i - 1) : 0;
    const std::int64_t length = values->at(i) - previous;
    if (length < 0) fail<std::invalid_argument>(name, text(values->at(i), " at position ", i), text("at least ", previous));
    if (i && length > max_seqlen) {
      fail<std::invalid_argument>(max_name, max_seqlen, text("at least ", length, ", the length of sequence ", i - 1));
    }
  }
  if (values->back() > total) {
    fail<std::invalid_argument>(name, text(values->back(), " at its end"), text("at most ", total, ", the rows there are"));
  }
}

void check_packing(const Packing& q, const Packing& k, const ArgumentNames& names) {
  check_packing_of(names.cu_seqlens_q, names.max_seqlen_q, q);
  check_packing_of(names.cu_seqlens_k, names.max_seqlen_k, k);
  if (k.cu_seqlens.size() != q.cu_seqlens.size()) {
    fail_shape(names.cu_seqlens_k, k.cu_seqlens,
               text("the shape of ", names.cu_seqlens_q, ", ", text_of(q.cu_seqlens.shape())));
  }
}

void check_options(const AttentionProblem& problem, const AttentionOptions& options, const mx::array& q) {
  check_scalars(options);
  check_dropout_key(options);
  if (options.alibi_slopes) check_alibi_slopes(problem, *options.alibi_slopes);
  if (options.learnable_sink) {
    require_floating("learnable_sink", *options.learnable_sink);
    require_shape("learnable_sink", *options.learnable_sink, {problem.heads_q}, "(heads,)");
  }
  if (options.attn_mask) check_attn_mask(problem, *options.attn_mask);
  if (options.qv) check_qv(*options.qv, q, problem.head_dim_v);
  check_seqused(problem, "seqused_q", options.seqused_q);
  check_seqused(problem, "seqused_k", options.seqused_k);
}

void check_used(const char* name, const std::optional<mx::array>& used, const std::optional<mx::array>& slots, int max_seqlen) {
  const auto values = used ? values_if_ready(*used) : std::nullopt;
  if (!values) return;
  const auto bounds = slots ? values_if_ready(*slots) : std::nullopt;
  for (std::size_t i = 0; i < values->size(); ++i) {
    const int length = bounds ? bounds->at(i + 1) - bounds->at(i) : max_seqlen;
    if (values->at(i) < 0 || values->at(i) > length) {
      fail<std::invalid_argument>(name, text(values->at(i), " for sequence ", i), text("a length of 0 to ", length));
    }
  }
}

void check_shapes(const AttentionCall& call) {
  if (call.problem.cached) {
    check_cached_tensors(call.q, call.k, call.v, call.optional, call.problem.varlen, {});
    check_cache_layout(call.problem, call.optional, "cache_seqlens");
    check_new_keys(call.problem, call.q, call.optional, {});
  } else {
    check_tensors(call.q, call.k, call.v, call.problem.varlen, {}, max_head_dim);
  }
  const OptionalInputs& optional = call.optional;
  if (optional.attn_mask) check_attn_mask(call.problem, *optional.attn_mask);
  if (optional.learnable_sink) require_shape("learnable_sink", *optional.learnable_sink, {call.problem.heads_q}, "(heads,)");
  if (optional.alibi_slopes) check_alibi_slopes(call.problem, *optional.alibi_slopes);
  if (optional.cu_seqlens_k) require_shape("cu_seqlens_k", *optional.cu_seqlens_k, {call.problem.batch + 1}, "(batch + 1,)");
  check_seqused(call.problem, "seqused_q", optional.seqused_q);
  check_seqused(call.problem, "seqused_k", optional.seqused_k);
}

void check_partials(const mx::array& out_partial, const mx::array& lse_partial, const std::optional<mx::Dtype>& out_dtype) {
  require_rank("out_partial", out_partial, 5, "(splits, batch, seqlen, heads, dim)");
  require_floating("out_partial", out_partial);
  require_dtype("lse_partial", lse_partial, mx::float32);
  const mx::Shape shape(out_partial.shape().begin(), out_partial.shape().end() - 1);
  require_shape("lse_partial", lse_partial, shape, "out_partial's without its last axis");
  if (out_partial.shape(0) < 1) fail_shape("out_partial", out_partial, "at least one split");
  if (out_dtype && !is_kernel_dtype(*out_dtype)) {
    fail<TypeError>("out_dtype", *out_dtype, "float32, bfloat16 or float16");
  }
}

}  // namespace flash_attn
