// Appending on Metal. MLX's nodes write a buffer in place if nothing else refers to it, but only if nothing has read it in the
// same evaluation either: so what becomes of a token without a place (past the capacity, on a page that is not there) must be
// decided without looking at the cache.
#include "ops/metal/kvcache.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "mlx/mlx.h"
#include "ops/call/inputs.h"
#include "ops/call/require.h"
#include "ops/graph/attention_node.h"
#include "ops/graph/vjp.h"
#include "ops/metal/attention.h"
#include "ops/metal/launch.h"
#include "ops/metal/probe.h"
#include "ops/metal/whole_rows.h"
#include "reference/cache_rows.h"
#include "reference/kvcache.h"
#include "semantics/paging.h"

namespace flash_attn {
namespace {

using Arrays = std::vector<mx::array>;
using Numbers = std::vector<std::int32_t>;

// ---- where new tokens go

/// Every new token, in the order of k_new, has a place that is known before anything is evaluated.
struct KnownPlaces {
  Numbers rows;                  // of the flattened cache
  std::optional<int> same_slot;  // dense: all sequences' tokens begin at this slot of their own row
  Numbers lengths;               // of the sequences, afterwards
};

/// The numbers of a call, if all of those are ready that places depend on.
struct ReadyNumbers {
  Numbers lengths, row_of_sequence, table, new_starts;

  static std::optional<ReadyNumbers> of(const AttentionCall& call) {
    const AttentionProblem& problem = call.problem;
    const OptionalInputs& optional = call.optional;
    ReadyNumbers numbers;
    bool ready = true;
    const auto read = [&](const std::optional<mx::array>& array, Numbers& values, auto otherwise) {
      if (array) {
        std::optional<Numbers> found = values_if_ready(*array);
        ready = ready && found;
        if (found) values = std::move(*found);
      } else {
        for (int i = 0; i <= problem.batch; ++i) values.push_back(otherwise(i));
      }
    };
    read(optional.seqused_k, numbers.lengths, [&](int) { return problem.key_capacity(); });
    read(optional.cache_batch_idx, numbers.row_of_sequence, [](int i) { return i; });
    read(optional.block_table, numbers.table, [](int) { return 0; });
    read(optional.cu_seqlens_k_new, numbers.new_starts, [&](int i) { return i * problem.seqlen_new; });
    if (!ready) return std::nullopt;
    return numbers;
  }
};

std::optional<std::int32_t> flat_row(const AttentionProblem& problem, const ReadyNumbers& numbers, std::int32_t row,
                                     std::int64_t slot) {
  const int rows = problem.page_size > 0 ? problem.table_rows : problem.cache_rows;
  if (row < 0 || row >= rows || slot >= problem.key_capacity()) return std::nullopt;
  const auto place = static_cast<std::int32_t>(slot);
  if (problem.page_size == 0) return row * problem.max_seqlen_k + place;
  const PageSlot in_page = page_slot(place, problem.page_size);
  const std::int32_t page = numbers.table[static_cast<std::size_t>(row) * problem.table_blocks + in_page.entry];
  if (!page_exists(page, problem.cache_rows)) return std::nullopt;
  return page * problem.page_size + in_page.row;
}

std::optional<KnownPlaces> known_places(const AttentionCall& call) {
  const AttentionProblem& problem = call.problem;
  const std::optional<ReadyNumbers> numbers = ReadyNumbers::of(call);
  if (!numbers || problem.batch == 0) return std::nullopt;
  const std::int32_t tokens = call.optional.cu_seqlens_k_new ? problem.total_new : problem.batch * problem.seqlen_new;
  if (numbers->new_starts[0] != 0 || numbers->new_starts[problem.batch] != tokens) return std::nullopt;

  KnownPlaces places;
  for (int i = 0; i < problem.batch; ++i) {
    const std::int64_t length = std::clamp(numbers->lengths[i], 0, problem.key_capacity());
    const std::int64_t added = std::int64_t{numbers->new_starts[i + 1]} - numbers->new_starts[i];
    for (std::int64_t token = 0; token < added; ++token) {
      const auto row = flat_row(problem, *numbers, numbers->row_of_sequence[i], length + token);
      if (!row) return std::nullopt;
      places.rows.push_back(*row);
    }
    places.lengths.push_back(static_cast<std::int32_t>(length + added));
  }
  if (places.rows.size() != static_cast<std::size_t>(tokens)) return std::nullopt;
  const bool own_rows = problem.page_size == 0 && !call.optional.cache_batch_idx && !call.optional.cu_seqlens_k_new;
  const bool same_length = std::equal(places.lengths.begin() + 1, places.lengths.end(), places.lengths.begin());
  if (own_rows && same_length) places.same_slot = places.lengths[0] - problem.seqlen_new;
  return places;
}

mx::array integers(const Numbers& values, mx::Shape shape) { return mx::array(values.begin(), std::move(shape), mx::int32); }

// ---- writing them

/// How new rows come into the parts of a cache, and how long its sequences are then.
class Append {
 public:
  explicit Append(const AttentionCall& call) : call_(call), lengths_(call), known_(known_places(call)) {}

  /// The parts of a cache, codes first, with `tokens` in their places.
  Arrays operator()(const mx::array& data, const std::optional<mx::array>& scales, const std::optional<mx::array>& biases,
                    const mx::array& tokens) const {
    Arrays parts = {data};
    if (scales) parts.push_back(*scales);
    if (biases) parts.push_back(*biases);
    if (tokens.size() == 0) return parts;
    if (known_) {
      const Arrays stored = reference::stored_form(tokens, data, scales, biases);
      for (std::size_t i = 0; i < parts.size(); ++i) parts[i] = written(parts[i], stored[i]);
    } else {
      const reference::NewRows fresh = reference::new_rows(call_, lengths_, tokens);
      reference::FlatSlots slots = reference::flat_slots(call_, reference::column(lengths_.cached) + fresh.token);
      slots.exists = slots.exists && fresh.is_real;
      const Arrays stored = reference::stored_form(fresh.rows, data, scales, biases);
      for (std::size_t i = 0; i < parts.size(); ++i) parts[i] = written_where_there_is_a_place(parts[i], stored[i], slots);
    }
    return parts;
  }

  mx::array lengths_after() const {
    if (known_) return integers(known_->lengths, {call_.problem.batch});
    return mx::minimum(lengths_.cached + lengths_.added, reference::number(call_.problem.key_capacity()));
  }

  const reference::CacheLengths& lengths_before() const { return lengths_; }

 private:
  mx::array written(const mx::array& cache, const mx::array& rows) const {
    if (known_->same_slot) {
      mx::Shape start(cache.ndim(), 0);
      mx::Shape stop = cache.shape();
      start[1] = *known_->same_slot;
      stop[1] = start[1] + rows.shape(1);
      return mx::slice_update(cache, rows, start, stop);
    }
    const int index_axes = call_.optional.cu_seqlens_k_new ? 1 : 2;
    const mx::Shape index_shape(rows.shape().begin(), rows.shape().begin() + index_axes);
    const mx::array written =
        mx::scatter(reference::by_rows(cache), integers(known_->rows, index_shape), mx::expand_dims(rows, index_axes), 0);
    return mx::reshape(written, cache.shape());
  }

  /// As bits, a minimum with 0 and then a maximum with x leave x; a minimum with all ones and a maximum with 0 leave what was
  /// there. So tokens without a place may go anywhere.
  static mx::array written_where_there_is_a_place(const mx::array& cache, const mx::array& rows,
                                                  const reference::FlatSlots& slots) {
    const mx::Dtype bits = cache.itemsize() == 4 ? mx::uint32 : cache.itemsize() == 2 ? mx::uint16 : mx::uint8;
    const std::uint32_t all_ones = std::numeric_limits<std::uint32_t>::max() >> (32 - 8 * cache.itemsize());
    const mx::array zero(0u, bits);
    const mx::array x = mx::view(mx::contiguous(mx::astype(rows, cache.dtype())), bits);
    mx::array has_place = slots.exists;
    while (has_place.ndim() < x.ndim()) has_place = mx::expand_dims(has_place, -1);
    const auto updates = [&](const mx::array& there, const mx::array& dropped) {
      return mx::expand_dims(mx::broadcast_to(mx::where(has_place, there, dropped), x.shape()), 2);
    };
    mx::array written = mx::view(reference::by_rows(cache), bits);
    written = mx::scatter_min(written, slots.index, updates(zero, mx::array(all_ones, bits)), 0);
    written = mx::scatter_max(written, slots.index, updates(x, zero), 0);
    return mx::reshape(mx::view(written, cache.dtype()), cache.shape());
  }

  const AttentionCall& call_;
  reference::CacheLengths lengths_;
  std::optional<KnownPlaces> known_;
};

// ---- rotary

Arrays no_gradient(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) { throw no_gradient_through_cache(); }

/// `token_starts`: where the sequences of packed x begin.
mx::array rotated(const AttentionCall& call, const mx::array& x, metal::Rotated which, const mx::array& base,
                  const std::optional<mx::array>& token_starts) {
  if (x.size() == 0) return x;
  Arrays inputs = {with_whole_rows(x, call.stream), base, *call.optional.rotary_cos, *call.optional.rotary_sin};
  if (token_starts) inputs.push_back(*token_starts);
  return launch_metal(metal::rotary_kernel(call.problem, which, token_starts.has_value()), inputs, {x.shape()}, {x.dtype()},
                      call.stream, no_gradient)[0];
}

/// What is left of a call once its new keys are in the cache.
AttentionCall without_new_keys(AttentionCall call) {
  OptionalInputs& optional = call.optional;
  for (auto* array : {&optional.k_new, &optional.v_new, &optional.cu_seqlens_k_new, &optional.rotary_cos, &optional.rotary_sin,
                      &optional.rotary_seqlens}) {
    array->reset();
  }
  AttentionProblem& problem = call.problem;
  problem.seqlen_new = problem.total_new = problem.rotary_dim = problem.rotary_rows = 0;
  return call;
}

}  // namespace

AttentionOutputs metal_decode(const AttentionCall& call) {
  const metal::Operands operands = metal_operands(call);
  const int splits = metal::decode_splits(call.problem, metal_gpu());
  const auto launch = [&](const metal::Kernel& kernel, const Arrays& inputs, mx::Shape out, mx::Shape lse, mx::Dtype dtype) {
    return launch_metal(kernel, inputs, {std::move(out), std::move(lse)}, {dtype, mx::float32}, call.stream, no_gradient);
  };
  const metal::Kernel decode = metal::decode_kernel(call.problem, operands, splits);
  if (splits == 1) {
    const Arrays outputs = launch(decode, node_inputs(call), out_shape(call), lse_shape(call), call.q.dtype());
    return {outputs[0], outputs[1]};
  }
  const auto of_splits = [splits](mx::Shape shape) {
    shape.insert(shape.begin(), splits);
    return shape;
  };
  const Arrays partial = launch(decode, node_inputs(call), of_splits(out_shape(call)), of_splits(lse_shape(call)), mx::float32);
  const metal::Kernel combine = metal::combine_kernel(call.problem, operands, splits);
  const Arrays outputs = launch(combine, partial, out_shape(call), lse_shape(call), call.q.dtype());
  return {outputs[0], outputs[1]};
}

namespace {

KVCacheOutputs append_and_attend(const AttentionCall& given) {
  const mx::StreamContext context(given.stream);
  const AttentionCall call = readable_by_metal(given);
  const OptionalInputs& optional = call.optional;
  const Append append(call);

  AttentionCall after = without_new_keys(call);
  mx::array k_new = *optional.k_new;
  if (optional.rotary_cos) {
    const mx::array base = mx::contiguous(reference::rotary_base(call, append.lengths_before()));
    k_new = rotated(call, k_new, metal::Rotated::new_keys, base, optional.cu_seqlens_k_new);
    after.q = rotated(call, call.q, metal::Rotated::queries, base, optional.cu_seqlens_q);
  }
  const Arrays k = append(given.k, optional.k_scales, optional.k_biases, k_new);
  const Arrays v = append(given.v, optional.v_scales, optional.v_biases, *optional.v_new);
  after.k = k[0];
  after.v = v[0];
  if (k.size() > 1) after.optional.k_scales = k[1], after.optional.v_scales = v[1];
  if (k.size() > 2) after.optional.k_biases = k[2], after.optional.v_biases = v[2];
  after.optional.seqused_k = append.lengths_after();
  const AttentionOutputs attention = metal_attention(after);
  Arrays cache = cache_arrays(after);
  if (call.q.size() == 0) return {attention, cache};
  // The next append then waits for this read, so that steps that are queued need no second cache. One node an array: MLX holds
  // on to all outputs of a node while it is computed.
  for (mx::array& array : cache) array = mx::depends({array}, {attention.out})[0];
  return {attention, cache};
}

/// Of the rotation; attention has its own probe.
Probe rotary_probe(const AttentionCall& call) {
  const auto arrays_of = [](KVCacheOutputs outputs) {
    Arrays arrays = std::move(outputs.cache);
    arrays.insert(arrays.end(), {outputs.attention.out, outputs.attention.lse});
    return arrays;
  };
  const bool packed_new_keys = call.optional.cu_seqlens_k_new.has_value();
  return {.texts = metal::rotary_kernel(call.problem, metal::Rotated::queries, call.problem.varlen).name +
                   metal::rotary_kernel(call.problem, metal::Rotated::new_keys, packed_new_keys).name,
          .by_kernel = [=] { return arrays_of(append_and_attend(small_call_like(call))); },
          .by_reference = [=] { return arrays_of(reference::attention_with_kvcache(small_call_like(call))); }};
}

}  // namespace

KVCacheOutputs metal_kvcache(const AttentionCall& call) {
  if (call.optional.rotary_cos && !is_trusted(rotary_probe(call), call.stream)) return reference::attention_with_kvcache(call);
  return append_and_attend(call);
}

}  // namespace flash_attn
