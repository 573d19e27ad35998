// softmax(mask(score modifiers(scale Q K^T))) V, written out. Everything is float32 and five-dimensional:
// queries [batch, heads_k, group, seqlen_q, dim], keys [batch, heads_k, 1, seqlen_k, dim], scores [.., seqlen_q, seqlen_k].
//
// Gradients are MLX's own. A value that must not matter is replaced where it enters (`select` on inputs) and not only where it
// leaves: the derivative of a masked NaN would be 0 * NaN.
#include "reference/reference.h"

#include <algorithm>
#include <limits>

#include "mlx/mlx.h"
#include "reference/kvcache.h"
#include "reference/select.h"
#include "reference/sequences.h"
#include "semantics/softmax.h"

namespace flash_attn::reference {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

mx::array number(float value) { return mx::array(value, mx::float32); }
mx::array number(int value) { return mx::array(value, mx::int32); }
mx::array or_zero(const mx::array& condition, const mx::array& x) { return select(condition, x, number(0.0f)); }

// ---- layout

// [batch, seq, heads, dim] to float32 [batch, heads_k, heads / heads_k, seq, dim].
mx::array heads_first(const AttentionProblem& problem, const mx::array& x) {
  const mx::array split = mx::unflatten(mx::astype(x, mx::float32), 2, {problem.heads_k, x.shape(2) / problem.heads_k});
  return mx::transpose(split, {0, 2, 3, 1, 4});
}

// [batch, heads_k, group, seq, ..] to [batch, seq, heads_q, ..].
mx::array heads_last(const mx::array& x) { return mx::moveaxis(mx::flatten(x, 1, 2), 1, 2); }

// attn_mask [batch or 1, heads_q or 1, rows, keys] to [.., heads_k or 1, group or 1, ..].
mx::array split_mask_heads(const AttentionProblem& problem, const mx::array& mask) {
  if (mask.shape(1) == 1) return mx::expand_dims(mask, 2);
  return mx::unflatten(mask, 1, {problem.heads_k, problem.group()});
}

// (heads_q,) or (batch, heads_q) to [batch or 1, heads_k, group, 1, 1].
mx::array per_head(const AttentionProblem& problem, const mx::array& x) {
  const int batch = x.ndim() == 2 ? x.shape(0) : 1;
  return mx::reshape(mx::astype(x, mx::float32), {batch, problem.heads_k, problem.group(), 1, 1});
}

// [batch, heads_k, group, rows, n] times [batch, heads_k, 1, n, m], the rows of a group stacked into one product.
mx::array group_matmul(const mx::array& a, const mx::array& b) {
  const mx::array product = mx::matmul(mx::flatten(a, 2, 3), mx::squeeze(b, 2));
  return mx::unflatten(product, 2, {a.shape(2), a.shape(3)});
}

// ---- which scores count

// visible_keys of src/semantics/mask.h as one boolean array [batch or 1, seqlen_q, seqlen_k]: the only other place where that
// rule is written. Differences are compared, not sums, so that windows near 2^31 cannot overflow.
mx::array visible_positions(const AttentionProblem& problem, const Sequences& queries, const Sequences& keys) {
  const mx::array row = mx::expand_dims(mx::arange(0, queries.padded_seqlen(), 1, mx::int32), 1);
  const mx::array key = mx::arange(0, keys.padded_seqlen(), 1, mx::int32);
  const mx::array diagonal = row + keys.lengths() - queries.lengths();
  const mx::array distance = diagonal - key;
  const MaskRule rule = problem.mask_rule(problem.max_seqlen_q, problem.max_seqlen_k);
  mx::array visible = row < queries.lengths() && key < keys.lengths();
  if (rule.window_left >= 0) visible = visible && distance <= number(rule.window_left);
  if (rule.window_right >= 0) visible = visible && mx::negative(distance) <= number(rule.window_right);
  if (rule.attention_chunk > 0) {
    const mx::array chunk = number(rule.attention_chunk);
    visible = visible && diagonal >= number(0) && mx::floor_divide(diagonal, chunk) == mx::floor_divide(key, chunk);
  }
  return visible;
}

// bool, broadcasts to the scores. An additive -inf hides a key as `false` does.
mx::array visible_scores(const AttentionProblem& problem, const Sequences& queries, const Sequences& keys,
                         const std::optional<mx::array>& mask) {
  mx::array visible = mx::expand_dims(visible_positions(problem, queries, keys), {1, 2});
  if (!mask) return visible;
  return visible && (mask->dtype() == mx::bool_ ? *mask : *mask != mx::array(-infinity, mask->dtype()));
}

// ---- scores

struct Operands {
  mx::array q, k, v;
};

// Zero for queries that see nothing and for keys and values that nobody sees.
Operands visible_operands(const AttentionProblem& problem, const mx::array& q, const mx::array& k, const mx::array& v,
                          const mx::array& visible) {
  const mx::array row_sees = mx::any(visible, -1, true);
  const mx::array key_seen = mx::swapaxes(mx::any(visible, std::vector<int>{2, 3}, true), -1, -2);
  return {or_zero(row_sees, heads_first(problem, q)), or_zero(key_seen, heads_first(problem, k)),
          or_zero(key_seen, heads_first(problem, v))};
}

// scale Q K^T. A key with a NaN makes its scores NaN by addition, so that it stays out of the gradients of rows that do not see
// it.
mx::array dot_scores(const AttentionProblem& problem, const mx::array& q, const mx::array& k) {
  const mx::array key_is_nan = mx::any(mx::isnan(k), -1, true);
  const mx::array dot = group_matmul(q, mx::swapaxes(or_zero(mx::logical_not(key_is_nan), k), -1, -2));
  const mx::array nan = mx::where(key_is_nan, number(std::numeric_limits<float>::quiet_NaN()), number(0.0f));
  return number(problem.softmax_scale) * dot + mx::swapaxes(nan, -1, -2);
}

// src/semantics/score.h: softcap, then ALiBi.
mx::array modify_scores(const AttentionCall& call, const Sequences& queries, const Sequences& keys, mx::array scores) {
  const AttentionProblem& problem = call.problem;
  if (problem.softcap > 0) {
    const mx::array softcap = number(problem.softcap);
    scores = softcap * mx::tanh(scores / softcap);
  }
  if (call.optional.alibi_slopes) {
    const mx::array row = mx::expand_dims(mx::arange(0, queries.padded_seqlen(), 1, mx::int32), 1);
    const mx::array key = mx::arange(0, keys.padded_seqlen(), 1, mx::int32);
    const mx::array distance = mx::expand_dims(mx::abs(row + keys.lengths() - queries.lengths() - key), {1, 2});
    scores = scores - mx::stop_gradient(per_head(problem, *call.optional.alibi_slopes)) * mx::astype(distance, mx::float32);
  }
  return scores;
}

// ---- softmax

struct Softmax {
  mx::array probabilities;
  mx::array lse;  // [.., seqlen_q, 1]
};

// `scores` are -inf where hidden. A row that sees nothing has probabilities 0 and lse -inf, or the sink.
Softmax softmax(const mx::array& scores, const std::optional<mx::array>& sink) {
  mx::array maximum = mx::maximum(mx::max(scores, -1, true), number(lowest_score));
  if (sink) maximum = mx::maximum(maximum, *sink);
  maximum = mx::stop_gradient(maximum);
  const mx::array weights = mx::exp(scores - maximum);
  mx::array sum = mx::sum(weights, -1, true);
  if (sink) sum = sum + mx::exp(*sink - maximum);
  const mx::array empty = sum == number(0.0f);
  const mx::array divisor = mx::where(empty, number(1.0f), sum);
  return {weights / divisor, select(mx::logical_not(empty), maximum + mx::log(divisor), number(-infinity))};
}

// ---- shapes that hold nothing

// One row that nobody sees, where an axis is empty: MLX's reductions and gathers refuse empty axes.
mx::array at_least_one_row(const mx::array& x, int axis) {
  if (x.shape(axis) > 0) return x;
  mx::Shape shape = x.shape();
  shape[axis] = 1;
  return mx::concatenate({x, mx::zeros(shape, x.dtype())}, axis);
}

Result nothing_to_compute(const AttentionCall& call) {
  const AttentionProblem& problem = call.problem;
  mx::Shape out_shape = call.q.shape();
  out_shape.back() = problem.head_dim_v;
  const mx::Shape lse_shape = problem.varlen ? mx::Shape{problem.heads_q, problem.total_q}
                                             : mx::Shape{problem.batch, problem.heads_q, problem.max_seqlen_q};
  return {mx::zeros(out_shape, call.q.dtype()), mx::full(lse_shape, -infinity, mx::float32),
          mx::zeros({problem.batch, problem.heads_q, problem.max_seqlen_q, problem.max_seqlen_k}, call.q.dtype())};
}

Result attend(const AttentionCall& call, const Sequences& queries, const Sequences& keys) {
  const AttentionProblem& problem = call.problem;
  const OptionalInputs& optional = call.optional;
  std::optional<mx::array> mask;
  if (optional.attn_mask && optional.attn_mask->size() > 0) mask = split_mask_heads(problem, *optional.attn_mask);
  std::optional<mx::array> sink;
  if (optional.learnable_sink) sink = per_head(problem, *optional.learnable_sink);

  const mx::array visible = visible_scores(problem, queries, keys, mask);
  const Operands x = visible_operands(problem, queries.pad(call.q), keys.pad(call.k), keys.pad(call.v), visible);
  mx::array scores = modify_scores(call, queries, keys, dot_scores(problem, x.q, x.k));
  if (mask && mask->dtype() != mx::bool_) scores = scores + or_zero(visible, mx::astype(*mask, mx::float32));
  const Softmax softmaxed = softmax(select(visible, scores, number(-infinity)), sink);

  mx::array kept = softmaxed.probabilities;
  mx::array signed_probabilities = softmaxed.probabilities;
  if (problem.has_dropout) {
    const mx::array keep_heads = dropout_keep_mask(problem, *optional.dropout_key, call.stream);
    const mx::array keep = mx::unflatten(keep_heads, 1, {problem.heads_k, problem.group()});
    kept = or_zero(keep, softmaxed.probabilities) * number(problem.dropout_scale);
    signed_probabilities = mx::where(keep, signed_probabilities, mx::negative(signed_probabilities));
  }
  const mx::array row_sees = mx::any(visible, -1, true);
  const mx::array out = or_zero(row_sees, group_matmul(kept, x.v));
  const mx::array inside = mx::arange(0, queries.padded_seqlen(), 1, mx::int32) < mx::squeeze(queries.lengths(), -1);
  const mx::array lse = select(mx::expand_dims(inside, {1, 2}), mx::squeeze(softmaxed.lse, -1), number(-infinity));
  const mx::array packed_lse = queries.unpad(heads_last(lse), -infinity);
  return {mx::astype(queries.unpad(heads_last(out), 0.0f), call.q.dtype()),
          problem.varlen ? mx::transpose(packed_lse) : mx::swapaxes(packed_lse, 1, 2),
          mx::astype(mx::stop_gradient(mx::flatten(signed_probabilities, 1, 2)), call.q.dtype())};
}

}  // namespace

Result attention(const AttentionCall& call) {
  const mx::StreamContext context(call.stream);
  if (call.problem.cached) return attention(gathered(call));
  const AttentionProblem& problem = call.problem;
  if (problem.batch == 0 || problem.max_seqlen_q == 0 || (problem.varlen && problem.total_q == 0))
    return nothing_to_compute(call);

  // An axis of keys that is empty gets a slot of length 0.
  AttentionCall padded = call;
  const auto key_axis = static_cast<int>(call.k.ndim()) - 3;
  padded.k = at_least_one_row(call.k, key_axis);
  padded.v = at_least_one_row(call.v, key_axis);
  padded.problem.max_seqlen_k = std::max(problem.max_seqlen_k, 1);
  const Sequences queries(problem.batch, problem.max_seqlen_q, problem.max_seqlen_q, problem.total_q,
                          call.optional.cu_seqlens_q, call.optional.seqused_q);
  const Sequences keys(problem.batch, padded.problem.max_seqlen_k, problem.max_seqlen_k, problem.total_k,
                       call.optional.cu_seqlens_k, call.optional.seqused_k);
  Result result = attend(padded, queries, keys);
  result.probabilities = mx::slice(result.probabilities, {0, 0, 0, 0},
                                   {problem.batch, problem.heads_q, problem.max_seqlen_q, problem.max_seqlen_k});
  return result;
}

}  // namespace flash_attn::reference
