#include "ops/metal_probe.h"

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "mlx/mlx.h"
#include "ops/inputs.h"
#include "ops/metal_launch.h"
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

class SmallData {
 public:
  explicit SmallData(mx::Stream stream) : stream_(stream), key_(mx::random::key(20220527)) {}

  mx::array normal(const mx::Shape& shape, mx::Dtype dtype) { return mx::random::normal(shape, dtype, next_key(), stream_); }

  mx::array like(const mx::array& array, const mx::Shape& shape) {
    if (array.dtype() == mx::bool_) return mx::greater(normal(shape, mx::float32), mx::array(-1.0f), stream_);
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

std::string why_not_trusted(const AttentionCall& call, const Probe& probe) {
  try {
    const mx::StreamContext context(call.stream);
    const AttentionCall small = small_call_like(call);
    std::vector<mx::array> got = probe.by_kernel(small);
    std::vector<mx::array> want = probe.by_reference(small);
    mx::eval(got);
    mx::eval(want);
    return difference(got, want);
  } catch (const std::exception& error) {
    return error.what();
  }
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
  const auto shape = [&](const mx::array& tensor, int seqlen, int total, int heads) {
    return problem.varlen ? mx::Shape{total, heads, tensor.shape(-1)} : mx::Shape{batch, seqlen, heads, tensor.shape(-1)};
  };
  const int total_q = std::min(problem.total_q, batch * rows);
  const int total_k = std::min(problem.total_k, batch * keys);
  problem.max_seqlen_q = rows;
  problem.max_seqlen_k = keys;
  problem.window_left = std::min(problem.window_left, 24);
  problem.window_right = std::min(problem.window_right, 24);
  problem.attention_chunk = std::min(problem.attention_chunk, 24);
  small.q = data.like(call.q, shape(call.q, rows, total_q, heads_q));
  small.k = data.like(call.k, shape(call.k, keys, total_k, heads_k));
  small.v = data.like(call.v, shape(call.v, keys, total_k, heads_k));
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
  return small;
}

bool is_trusted(const AttentionCall& call, const Probe& probe) {
  if (!metal_launches_are_probed()) return true;
  if (const auto verdict = verdicts().find(probe.texts)) return *verdict;
  const std::string why_not = why_not_trusted(call, probe);
  verdicts().set(probe.texts, why_not.empty());
  if (!why_not.empty()) {
    warn_once("[flash_attn] a Metal kernel is not used and MLX ops compute instead, in O(N^2) memory: " + why_not);
  }
  return why_not.empty();
}

void forget_probes() { verdicts().clear(); }

}  // namespace flash_attn
