// Attention over a cache as MLX ops: new keys scattered into copies of the caches, every sequence's keys gathered into a dense
// tensor.
#include "reference/kvcache.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "mlx/mlx.h"
#include "ops/call/inputs.h"
#include "ops/graph/vjp.h"
#include "reference/cache_rows.h"
#include "reference/reference.h"
#include "semantics/rotary.h"

namespace flash_attn::reference {
namespace {

// ---- appending

/// `x` (.., heads, dim) turned by the angles of `positions`, whose axes are those before heads. In float32, rounded once.
mx::array rotated(const AttentionCall& call, const mx::array& x, const mx::array& positions) {
  const int dim = call.problem.rotary_dim;
  const auto angles = [&](const mx::array& table) {
    const mx::array row = mx::clip(positions, number(0), number(call.problem.rotary_rows - 1));
    return mx::expand_dims(mx::astype(mx::take(table, row, 0), mx::float32), -2);
  };
  const mx::array cosine = angles(*call.optional.rotary_cos);
  const mx::array sine = angles(*call.optional.rotary_sin);
  const bool interleaved = call.problem.rotary_interleaved;
  std::vector<mx::array> parts = mx::split(mx::astype(x, mx::float32), mx::Shape{dim}, -1);
  const mx::array pairs = mx::unflatten(parts[0], -1, interleaved ? mx::Shape{dim / 2, 2} : mx::Shape{2, dim / 2});
  const int axis = interleaved ? -1 : -2;
  const mx::array first = mx::take(pairs, 0, axis);
  const mx::array second = mx::take(pairs, 1, axis);
  const mx::array turned = mx::stack({first * cosine - second * sine, first * sine + second * cosine}, axis);
  return mx::astype(mx::concatenate({mx::flatten(turned, -2, -1), parts[1]}, -1), x.dtype());
}

/// Rule of src/semantics/rotary.h for every query. base int32 (batch, 1).
mx::array rotated_queries(const AttentionCall& call, const mx::array& base) {
  const AttentionProblem& problem = call.problem;
  const bool one_by_one = rotary_position_of_query(0, 1, problem.causal, problem.window_left, problem.window_right) == 1;
  const int rows = problem.varlen ? problem.total_q : problem.max_seqlen_q;
  const mx::array row = mx::arange(0, rows, 1, mx::int32);
  if (!problem.varlen) return rotated(call, call.q, one_by_one ? base + row : mx::broadcast_to(base, {problem.batch, rows}));
  // The sequence of a packed row: as many as have ended before it.
  const mx::array ends = mx::slice(*call.optional.cu_seqlens_q, {1}, {problem.batch + 1});
  const mx::array sequence = mx::minimum(mx::sum(mx::astype(column(row) >= ends, mx::int32), 1), number(problem.batch - 1));
  const mx::array start = mx::take(*call.optional.cu_seqlens_q, sequence);
  const mx::array base_of_row = mx::take(mx::flatten(base), sequence);
  return rotated(call, call.q, one_by_one ? base_of_row + row - start : base_of_row);
}

/// A copy of `cache` with the rows written; those without a place are dropped.
mx::array scattered(const mx::array& cache, const FlatSlots& slots, const mx::array& rows) {
  const mx::array flat = by_rows(cache);
  mx::Shape one_row = flat.shape();
  one_row[0] = 1;
  // What is dropped goes to a row of its own.
  const mx::array dump = mx::concatenate({flat, mx::zeros(one_row, flat.dtype())}, 0);
  const mx::array index = mx::where(slots.exists, slots.index, number(flat.shape(0)));
  const mx::array written = mx::scatter(dump, index, mx::expand_dims(rows, 2), 0);
  return mx::reshape(mx::slice(written, mx::Shape(flat.ndim(), 0), flat.shape()), cache.shape());
}

/// The parts of a cache after the append, codes first.
std::vector<mx::array> appended(const mx::array& data, const std::optional<mx::array>& scales,
                                const std::optional<mx::array>& biases, const FlatSlots& slots, const mx::array& rows) {
  const std::vector<mx::array> stored = stored_form(rows, data, scales, biases);
  std::vector<mx::array> parts = {scattered(data, slots, stored[0])};
  if (scales) parts.push_back(scattered(*scales, slots, stored[1]));
  if (biases) parts.push_back(scattered(*biases, slots, stored[2]));
  return parts;
}

// ---- gathering

mx::array dequantized(const mx::array& data, const std::optional<mx::array>& scales, const std::optional<mx::array>& biases) {
  if (!scales) return data;
  if (!biases) return mx::astype(data, mx::float32) * mx::expand_dims(*scales, -1);
  const int bits = data.shape(-1) * 32 / values_of_codes(data, biases);
  return mx::dequantize(data, mx::astype(*scales, mx::float32), mx::astype(*biases, mx::float32), quantization_group, bits);
}

mx::array with_missing_hidden(const std::optional<mx::array>& mask, const mx::array& exists) {
  mx::array visible = mx::expand_dims(exists, {1, 2});
  if (!mask) return visible;
  if (mask->dtype() == mx::bool_) return *mask && visible;
  return mx::where(visible, *mask, mx::array(-std::numeric_limits<float>::infinity(), mask->dtype()));
}

}  // namespace

AttentionCall gathered(const AttentionCall& call) {
  const CacheLengths lengths(call);
  const int capacity = call.problem.key_capacity();
  const mx::array position = mx::expand_dims(mx::arange(0, capacity, 1, mx::int32), 0);
  const FlatSlots slots = flat_slots(call, column(lengths.leftpad) + position);
  const auto gather = [&](const mx::array& data, const std::optional<mx::array>& scales,
                          const std::optional<mx::array>& biases) {
    return mx::take(by_rows(dequantized(data, scales, biases)), slots.index, 0);
  };
  const OptionalInputs& optional = call.optional;
  AttentionCall dense = call;
  dense.problem.cached = false;
  dense.problem.max_seqlen_k = capacity;
  dense.k = gather(call.k, optional.k_scales, optional.k_biases);
  dense.v = gather(call.v, optional.v_scales, optional.v_biases);
  dense.optional.seqused_k = mx::minimum(lengths.cached + lengths.added, number(capacity)) - lengths.leftpad;
  dense.optional.attn_mask = with_missing_hidden(optional.attn_mask, slots.exists);
  if (call.problem.has_qv) {
    dense.q = mx::concatenate({call.q, *optional.qv}, -1);
    dense.k = mx::concatenate({dense.k, dense.v}, -1);
    dense.problem.head_dim = call.problem.scored_dims();
    dense.problem.has_qv = false;
  }
  return dense;
}

AttentionOutputs attention_over_cache(const AttentionCall& call) {
  using Arrays = std::vector<mx::array>;
  const auto attend = [problem = call.problem, present = presence(call.optional), stream = call.stream](const Arrays& inputs) {
    const Result result = attention(call_of_node(problem, present, inputs, stream));
    return Arrays{result.out, result.lse};
  };
  const auto refuse = [](const Arrays&, const Arrays&, const Arrays&) -> Arrays { throw no_gradient_through_cache(); };
  const Arrays outputs = mx::custom_vjp(attend, refuse)(node_inputs(call));
  return {outputs[0], outputs[1]};
}

KVCacheOutputs attention_with_kvcache(const AttentionCall& call) {
  const mx::StreamContext context(call.stream);
  const OptionalInputs& optional = call.optional;
  const CacheLengths lengths(call);
  NewRows k = new_rows(call, lengths, *optional.k_new);
  const NewRows v = new_rows(call, lengths, *optional.v_new);
  AttentionCall after = call;
  if (optional.rotary_cos) {
    const mx::array base = column(rotary_base(call, lengths));
    k.rows = rotated(call, k.rows, base + k.token);
    after.q = rotated_queries(call, base);
  }
  FlatSlots slots = flat_slots(call, column(lengths.cached) + k.token);
  slots.exists = slots.exists && k.is_real;
  const std::vector<mx::array> k_parts = appended(call.k, optional.k_scales, optional.k_biases, slots, k.rows);
  const std::vector<mx::array> v_parts = appended(call.v, optional.v_scales, optional.v_biases, slots, v.rows);
  after.k = k_parts[0];
  after.v = v_parts[0];
  if (k_parts.size() > 1) after.optional.k_scales = k_parts[1], after.optional.v_scales = v_parts[1];
  if (k_parts.size() > 2) after.optional.k_biases = k_parts[2], after.optional.v_biases = v_parts[2];
  return {attention_over_cache(after), cache_arrays(after)};
}

}  // namespace flash_attn::reference
