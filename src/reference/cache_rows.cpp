#include "reference/cache_rows.h"

#include <algorithm>

#include "ops/call/inputs.h"

namespace flash_attn::reference {

CacheLengths::CacheLengths(const AttentionCall& call)
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

mx::array rotary_base(const AttentionCall& call, const CacheLengths& lengths) {
  return call.optional.rotary_seqlens ? *call.optional.rotary_seqlens : lengths.cached;
}

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

std::vector<mx::array> stored_form(const mx::array& rows, const mx::array& data, const std::optional<mx::array>& scales,
                                   const std::optional<mx::array>& biases) {
  if (!scales) return {rows};
  if (!biases) {
    const mx::array x = mx::astype(rows, mx::float32);
    const mx::array scale = mx::max(mx::abs(x), -1) / mx::array(127.0f);
    const mx::array inverse = mx::where(scale > mx::array(0.0f), mx::array(1.0f) / scale, mx::array(0.0f));
    return {mx::astype(mx::round(x * mx::expand_dims(inverse, -1)), mx::int8), scale};
  }
  const int bits = data.shape(-1) * 32 / values_of_codes(data, biases);
  return mx::quantize(mx::astype(rows, scales->dtype()), quantization_group, bits);
}

}  // namespace flash_attn::reference
