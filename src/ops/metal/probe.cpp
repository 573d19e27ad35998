#include "ops/metal/probe.h"

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "mlx/mlx.h"
#include "ops/call/inputs.h"
#include "ops/metal/launch.h"
#include "ops/warn.h"

namespace flash_attn {
namespace {

class Verdicts {
 public:
  std::optional<bool> find(const std::string& texts) const {
    const std::lock_guard lock(mutex_);
    const auto found = trusted_.find(texts);
    return found == trusted_.end() ? std::nullopt : std::optional(found->second);
  }

  void set(const std::string& texts, bool trusted) {
    const std::lock_guard lock(mutex_);
    trusted_[texts] = trusted;
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    trusted_.clear();
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::string, bool> trusted_;
};

Verdicts& verdicts() {
  static Verdicts instance;
  return instance;
}

// ---- a small call

// At least 8 each: an array stays as long, or becomes no shorter than 8.
constexpr int most_sequences = 8;
constexpr int most_kv_heads = 8;
constexpr int most_rows = 40;
constexpr int most_keys = 72;
constexpr int most_blocks = 8;
constexpr int most_new_keys = 8;

class SmallData {
 public:
  explicit SmallData(mx::Stream stream) : stream_(stream), key_(mx::random::key(20220527)) {}

  mx::array normal(const mx::Shape& shape, mx::Dtype dtype) { return mx::random::normal(shape, dtype, next_key(), stream_); }

  mx::array like(const mx::array& array, const mx::Shape& shape) {
    if (array.dtype() == mx::bool_) return mx::greater(normal(shape, mx::float32), mx::array(-1.0f), stream_);
    if (array.dtype() == mx::uint32) return mx::random::bits(shape, 4, next_key(), stream_);
    if (array.dtype() == mx::int8) return mx::astype(mx::multiply(normal(shape, mx::float32), mx::array(40.0f)), mx::int8);
    return normal(shape, array.dtype());
  }

 private:
  mx::array next_key() {
    auto [key, rest] = mx::random::split(key_, stream_);
    key_ = rest;
    return key;
  }

  mx::Stream stream_;
  mx::array key_;
};

mx::array integers(const std::vector<std::int32_t>& values) {
  return mx::array(values.begin(), {static_cast<int>(values.size())}, mx::int32);
}

/// Of packed sequences; some rows belong to none.
mx::array starts_of(int sequences, int total, int longest) {
  std::vector<std::int32_t> starts = {0};
  for (int i = 0; i < sequences; ++i) {
    const int share = (total - starts.back()) / (sequences - i);
    starts.push_back(starts.back() + std::clamp(share - i % 2, 0, longest));
  }
  return integers(starts);
}

mx::array used_of(int sequences, int longest) {
  std::vector<std::int32_t> used;
  for (int i = 0; i < sequences; ++i) used.push_back(std::max(longest - 3 * i, 0));
  return integers(used);
}

int shrunk(int size, int most) { return std::min(size, most); }

mx::Shape shrunk(const mx::Shape& shape, const mx::Shape& most) {
  mx::Shape result;
  for (std::size_t i = 0; i < shape.size(); ++i) result.push_back(std::min(shape[i], most[i]));
  return result;
}

// ---- comparing

/// Wrong text is wrong by much; rounding is no reason to warn.
double tolerance_of(mx::Dtype dtype) { return dtype == mx::float32 ? 1e-3 : dtype == mx::float16 ? 1e-2 : 5e-2; }

/// Why they differ; empty: they do not.
std::string difference(const std::vector<mx::array>& got, const std::vector<mx::array>& want) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double tolerance = tolerance_of(want[i].dtype());
    const mx::array x = mx::astype(got.at(i), mx::float32);
    const mx::array y = mx::astype(want[i], mx::float32);
    if (!mx::allclose(x, y, tolerance, tolerance, /*equal_nan=*/false).item<bool>()) return "it gives wrong numbers";
  }
  return {};
}

std::string why_not_trusted(const Probe& probe, mx::Stream stream) {
  try {
    const mx::StreamContext context(stream);
    std::vector<mx::array> got = probe.by_kernel();
    std::vector<mx::array> want = probe.by_reference();
    mx::eval(got);
    mx::eval(want);
    return difference(got, want);
  } catch (const std::exception& error) {
    return error.what();
  }
}

}  // namespace

namespace {

/// Rows of a cache, or pages that a table lists.
void shrink_cache(const AttentionCall& call, AttentionCall& small, SmallData& data) {
  const AttentionProblem& problem = call.problem;
  OptionalInputs& optional = small.optional;
  const int batch = shrunk(problem.batch, most_sequences);
  const int heads_k = shrunk(problem.heads_k, most_kv_heads);
  int rows = optional.cache_batch_idx ? shrunk(problem.cache_rows, most_sequences) : batch;
  int slots = shrunk(problem.max_seqlen_k, most_keys);
  if (problem.page_size > 0) {
    const int table_rows = optional.cache_batch_idx ? shrunk(problem.table_rows, most_sequences) : batch;
    const int blocks = shrunk(problem.table_blocks, most_blocks);
    rows = table_rows * blocks;
    slots = problem.page_size;
    std::vector<std::int32_t> pages;
    for (int i = 0; i < rows; ++i) pages.push_back(rows - 1 - i);
    optional.block_table = mx::reshape(integers(pages), {table_rows, blocks});
  }
  const auto resized = [&](const mx::array& array) {
    mx::Shape shape = array.shape();
    shape[0] = rows;
    shape[1] = slots;
    shape[2] = heads_k;
    return shape;
  };
  small.k = data.like(call.k, resized(call.k));
  small.v = data.like(call.v, resized(call.v));
  for (auto* part : {&optional.k_scales, &optional.k_biases, &optional.v_scales, &optional.v_biases}) {
    if (*part) *part = mx::multiply(mx::array(0.02f, (*part)->dtype()), data.like(**part, resized(**part)));
  }
  if (optional.cache_batch_idx) {
    std::vector<std::int32_t> of_sequence;
    const int there = problem.page_size > 0 ? optional.block_table->shape(0) : rows;
    for (int i = 0; i < batch; ++i) of_sequence.push_back((3 * i + 1) % there);
    optional.cache_batch_idx = integers(of_sequence);
  }
  if (optional.cache_leftpad) {
    std::vector<std::int32_t> leftpad;
    for (int i = 0; i < batch; ++i) leftpad.push_back(i % 3);
    optional.cache_leftpad = integers(leftpad);
  }
}

/// `keys`: slots in use, the new ones among them.
void shrink_new_keys(const AttentionCall& call, AttentionCall& small, SmallData& data, int keys) {
  AttentionProblem& problem = small.problem;
  OptionalInputs& optional = small.optional;
  const bool packed = optional.cu_seqlens_k_new.has_value();
  const int batch = small.problem.batch;
  const int added = std::min({packed ? call.problem.total_new : call.problem.seqlen_new, most_new_keys, keys});
  for (auto* tensor : {&optional.k_new, &optional.v_new}) {
    const int dim = (*tensor)->shape(-1);
    *tensor =
        data.like(**tensor, packed ? mx::Shape{added, problem.heads_k, dim} : mx::Shape{batch, added, problem.heads_k, dim});
  }
  if (packed) optional.cu_seqlens_k_new = starts_of(batch, added, added);
  optional.seqused_k = used_of(batch, keys - added);
  if (!optional.rotary_cos) return;
  for (auto* table : {&optional.rotary_cos, &optional.rotary_sin}) {
    *table = data.like(**table, {problem.key_capacity(), (*table)->shape(1)});
  }
  if (optional.rotary_seqlens) optional.rotary_seqlens = used_of(batch, keys - added);
}

}  // namespace

AttentionCall small_call_like(const AttentionCall& call) {
  AttentionCall small = call;
  AttentionProblem& problem = small.problem;
  OptionalInputs& optional = small.optional;
  SmallData data(call.stream);
  const int batch = shrunk(problem.batch, most_sequences);
  const int heads_k = shrunk(problem.heads_k, most_kv_heads);
  const int heads_q = heads_k * problem.group();
  const int rows = shrunk(problem.max_seqlen_q, most_rows);
  const int keys = shrunk(problem.max_seqlen_k, most_keys);
  const int total_q = std::min(problem.total_q, batch * rows);
  const int total_k = std::min(problem.total_k, batch * keys);
  const auto shape = [&](const mx::array& tensor, int seqlen, int total, int heads) {
    return problem.varlen ? mx::Shape{total, heads, tensor.shape(-1)} : mx::Shape{batch, seqlen, heads, tensor.shape(-1)};
  };
  problem.max_seqlen_q = rows;
  problem.max_seqlen_k = keys;
  problem.window_left = std::min(problem.window_left, 24);
  problem.window_right = std::min(problem.window_right, 24);
  problem.attention_chunk = std::min(problem.attention_chunk, 24);
  small.q = data.like(call.q, shape(call.q, rows, total_q, heads_q));
  if (optional.qv) optional.qv = data.like(*optional.qv, shape(*optional.qv, rows, total_q, heads_q));
  if (problem.cached) {
    shrink_cache(call, small, data);
  } else {
    small.k = data.like(call.k, shape(call.k, keys, total_k, heads_k));
    small.v = data.like(call.v, shape(call.v, keys, total_k, heads_k));
  }
  if (optional.attn_mask) {
    optional.attn_mask = data.like(*optional.attn_mask, shrunk(optional.attn_mask->shape(), {batch, heads_q, rows, keys}));
  }
  if (optional.learnable_sink) optional.learnable_sink = data.normal({heads_q}, mx::float32);
  if (optional.alibi_slopes) {
    const mx::Shape slopes = optional.alibi_slopes->ndim() == 2 ? mx::Shape{batch, heads_q} : mx::Shape{heads_q};
    optional.alibi_slopes = mx::abs(data.normal(slopes, mx::float32));
  }
  if (optional.cu_seqlens_q) optional.cu_seqlens_q = starts_of(batch, total_q, rows);
  if (optional.cu_seqlens_k) optional.cu_seqlens_k = starts_of(batch, total_k, keys);
  if (optional.seqused_q) optional.seqused_q = used_of(batch, rows);
  if (optional.seqused_k) optional.seqused_k = used_of(batch, keys);
  if (optional.dropout_key) optional.dropout_key = mx::array({17u, 4u}, mx::uint32);
  set_sizes(problem, small.q, small.k, small.v, optional);
  if (optional.k_new) {
    shrink_new_keys(call, small, data, keys);
    set_sizes(problem, small.q, small.k, small.v, optional);
  }
  return small;
}

bool is_trusted(const Probe& probe, mx::Stream stream) {
  if (!metal_launches_are_probed()) return true;
  if (const auto verdict = verdicts().find(probe.texts)) return *verdict;
  const std::string why_not = why_not_trusted(probe, stream);
  verdicts().set(probe.texts, why_not.empty());
  if (!why_not.empty()) {
    warn_once("[flash_attn] a Metal kernel is not used and MLX ops compute instead, in O(N^2) memory: " + why_not);
  }
  return why_not.empty();
}

void forget_probes() { verdicts().clear(); }

}  // namespace flash_attn
