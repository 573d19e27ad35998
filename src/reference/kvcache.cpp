// Attention over a cache as MLX ops: new keys scattered into copies of the caches, every sequence's keys gathered into a dense
// tensor.
#include "reference/kvcache.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "mlx/mlx.h"
#include "ops/inputs.h"
#include "ops/vjp.h"
#include "reference/reference.h"
#include "semantics/rotary.h"

namespace flash_attn::reference {
namespace {

mx::array number(int value) { return mx::array(value, mx::int32); }
mx::array column(const mx::array& x) { return mx::expand_dims(x, 1); }

/// Where sequences lie in their cache, all int32 (batch,).
struct CacheLengths {
  mx::array cached;  // slots in use before the append
  mx::array added;   // new keys
  mx::array leftpad;

  explicit CacheLengths(const AttentionCall& call)
      : cached(mx::full({call.problem.batch}, call.problem.key_capacity(), mx::int32)),
        added(mx::full({call.problem.batch}, call.problem.seqlen_new, mx::int32)),
        leftpad(mx::zeros({call.problem.batch}, mx::int32)) {
    const OptionalInputs& optional = call.optional;
    const mx::array capacity = number(call.problem.key_capacity());
    if (optional.seqused_k) cached = mx::clip(*optional.seqused_k, number(0), capacity);
    if (optional.cu_seqlens_k_new) {
      const int batch = call.problem.batch;
      added = mx::slice(*optional.cu_seqlens_k_new, {1}, {batch + 1}) - mx::slice(*optional.cu_seqlens_k_new, {0}, {batch});
    }
    if (optional.cache_leftpad) leftpad = mx::clip(*optional.cache_leftpad, number(0), mx::minimum(cached + added, capacity));
  }
};

/// Slots (batch, n) as rows of a cache whose first two axes are flattened.
struct FlatSlots {
  mx::array index;
  mx::array exists;
};

FlatSlots flat_slots(const AttentionCall& call, const mx::array& slots) {
  const AttentionProblem& problem = call.problem;
  const OptionalInputs& optional = call.optional;
  const int cache_rows = problem.page_size > 0 ? problem.table_rows : problem.cache_rows;
  mx::array row = column(optional.cache_batch_idx ? *optional.cache_batch_idx : mx::arange(0, problem.batch, 1, mx::int32));
  mx::array exists =
      row >= number(0) && row < number(cache_rows) && slots >= number(0) && slots < number(problem.key_capacity());
  row = mx::where(exists, row, number(0));
  const mx::array slot = mx::where(exists, slots, number(0));
  if (problem.page_size == 0) return {row * number(problem.max_seqlen_k) + slot, exists};

  const mx::array page_size = number(problem.page_size);
  const mx::array entry = row * number(problem.table_blocks) + mx::floor_divide(slot, page_size);
  const mx::array page = mx::take(mx::flatten(*optional.block_table), entry);
  exists = exists && page >= number(0) && page < number(problem.cache_rows);
  return {mx::where(exists, page, number(0)) * page_size + mx::remainder(slot, page_size), exists};
}

mx::array by_rows(const mx::array& cache) { return mx::flatten(cache, 0, 1); }

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

mx::array rotary_base(const AttentionCall& call, const CacheLengths& lengths) {
  return call.optional.rotary_seqlens ? *call.optional.rotary_seqlens : lengths.cached;
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

/// New keys or values as (batch, n, heads, dim), and which of them are real.
struct NewRows {
  mx::array rows;
  mx::array token;  // int32 (1, n)
  mx::array is_real;
};

NewRows new_rows(const AttentionCall& call, const CacheLengths& lengths, const mx::array& given) {
  const std::optional<mx::array>& starts = call.optional.cu_seqlens_k_new;
  const int most = starts ? call.problem.total_new : call.problem.seqlen_new;
  const mx::array token = mx::expand_dims(mx::arange(0, most, 1, mx::int32), 0);
  const mx::array is_real = token < column(lengths.added);
  if (!starts) return {given, token, is_real};
  const mx::array start = column(mx::slice(*starts, {0}, {call.problem.batch}));
  const mx::array row = mx::clip(start + token, number(0), number(std::max(most - 1, 0)));
  return {mx::take(given, row, 0), token, is_real};
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
  if (!scales) return {scattered(data, slots, rows)};
  if (!biases) {
    const mx::array x = mx::astype(rows, mx::float32);
    const mx::array scale = mx::max(mx::abs(x), -1) / mx::array(127.0f);
    const mx::array inverse = mx::where(scale > mx::array(0.0f), mx::array(1.0f) / scale, mx::array(0.0f));
    const mx::array codes = mx::astype(mx::round(x * mx::expand_dims(inverse, -1)), mx::int8);
    return {scattered(data, slots, codes), scattered(*scales, slots, scale)};
  }
  const int bits = data.shape(-1) * 32 / values_of_codes(data, biases);
  const std::vector<mx::array> quantized = mx::quantize(mx::astype(rows, scales->dtype()), quantization_group, bits);
  return {scattered(data, slots, quantized[0]), scattered(*scales, slots, quantized[1]),
          scattered(*biases, slots, quantized[2])};
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
