#include "random_problem.h"

#include <algorithm>
#include <limits>
#include <random>
#include <utility>

namespace flash_attn::test {
namespace {

constexpr std::int32_t highest = std::numeric_limits<std::int32_t>::max();
constexpr std::int32_t lowest = std::numeric_limits<std::int32_t>::min();

std::int32_t random_length(ByteSource& source) {
  switch (source.integer(0, 3)) {
    case 0:
      return source.integer(0, 2);
    case 1:
      return source.integer(0, 300);
    default:
      return source.integer(1, 70);
  }
}

std::int32_t random_window(ByteSource& source) {
  return source.one_in(2) ? source.integer(0, 40) : source.choose({-1, -2, lowest, 0, 1, 100, highest, highest - 1});
}

std::int32_t lie(ByteSource& source) { return source.choose({-1, lowest, highest, highest - 1, 0, 1, 7, 1000}); }

Layout random_layout(ByteSource& source) {
  return source.choose({Layout::contiguous, Layout::heads_first, Layout::packed, Layout::gaps, Layout::strided_dim,
                        Layout::reversed, Layout::same_batch});
}

// Lengths of one side of a varlen call, as cu_seqlens in a tensor that may have rows before and after them.
void random_sequences(ByteSource& source, std::int32_t batch, std::int32_t limit, bool hostile,
                      std::vector<std::int32_t>& cu_seqlens, std::int32_t& total, std::int32_t& max_seqlen) {
  std::int32_t position = source.one_in(4) ? 3 : 0;
  max_seqlen = source.one_in(4) ? 1 : 0;
  cu_seqlens.push_back(position);
  for (std::int32_t i = 0; i < batch; ++i) {
    const std::int32_t length = std::min(random_length(source), limit);
    max_seqlen = std::max(max_seqlen, length);
    cu_seqlens.push_back(position += length);
  }
  total = position + (source.one_in(4) ? 5 : 0);
  if (!hostile) return;
  for (std::int32_t& entry : cu_seqlens) {
    if (source.one_in(3)) entry = lie(source);
  }
  if (source.one_in(2)) max_seqlen = source.integer(0, 2 * limit);
}

void random_sizes(ByteSource& source, AttentionProblem& problem) {
  problem.dtype = source.choose({DType::float32, DType::bfloat16, DType::float16});
  problem.batch = source.one_in(16) ? 0 : source.integer(1, 3);
  problem.heads_k = source.integer(1, 3);
  problem.heads_q = problem.heads_k * source.choose({1, 1, 2, 3, 4, 9});
  problem.head_dim = source.one_in(6) ? source.integer(100, 576) : source.integer(1, 80);
  if (source.one_in(3)) problem.head_dim = source.choose({32, 64, 64, 96, 128});
  problem.head_dim_v = source.one_in(3) ? source.integer(1, 80) : problem.head_dim;
}

// Scores that `work` allows.
std::int64_t score_limit(const AttentionProblem& problem, std::int64_t work) {
  const std::int64_t work_per_score = std::int64_t{problem.batch} * problem.heads_q * (problem.head_dim + problem.head_dim_v);
  return work / std::max<std::int64_t>(1, work_per_score);
}

void random_options(ByteSource& source, AttentionProblem& problem, Features& features) {
  problem.softmax_scale = source.choose({0.125f, 0.25f, -0.125f, 0.5f, 0.0f});
  problem.softcap = source.choose({0.0f, 0.0f, 1.0f, 15.0f});
  problem.causal = source.one_in(3);
  if (source.one_in(3)) {
    problem.window_left = random_window(source);
    problem.window_right = random_window(source);
  }
  if (source.one_in(6)) problem.attention_chunk = source.choose({1, 5, 16, 100, highest});
  if (source.one_in(3)) set_dropout(problem, source.choose({0.17, 0.5, 0.9, 0.001}));

  features.q = random_layout(source);
  features.k = random_layout(source);
  features.v = random_layout(source);
  features.out = source.choose({Layout::contiguous, Layout::heads_first, Layout::gaps, Layout::streamed});
  features.alibi = source.one_in(3);
  features.alibi_per_batch = source.one_in(2);
  features.sink = source.one_in(3);
  features.attn_mask = source.one_in(3);
  features.mask_dtype = source.choose({DType::boolean, DType::float32, DType::bfloat16, DType::float16});
  features.mask_batch = source.one_in(2);
  features.mask_heads = source.one_in(2);
  features.mask_rows = source.one_in(2);
  features.mask_keys = source.one_in(2);
  problem.num_splits = source.choose({0, 0, 1, 3, 1000});
}

std::vector<std::int32_t> random_values(ByteSource& source, std::int32_t count, std::int32_t high, bool hostile) {
  std::vector<std::int32_t> values;
  for (std::int32_t i = 0; i < count; ++i) {
    values.push_back(hostile && source.one_in(2) ? lie(source) : source.integer(0, std::max(high, 0)));
  }
  return values;
}

void random_codes(ByteSource& source, AttentionProblem& problem, CacheFeatures& cache) {
  const auto [k, v] = source.choose<std::pair<DType, DType>>({{DType::int8, DType::int8},
                                                              {DType::affine8, DType::affine8},
                                                              {DType::affine4, DType::affine4},
                                                              {DType::affine8, DType::affine4},
                                                              {DType::affine4, DType::affine8}});
  cache.k_codes = k;
  cache.v_codes = v;
  if (k == DType::int8) return;
  cache.scale_dtype = source.choose({DType::float32, DType::bfloat16, DType::float16});
  problem.head_dim = quantization_group * source.choose({1, 1, 2, 9});
  problem.head_dim_v = quantization_group * source.choose({1, 1, 2, 9});
}

// Pages in any order, one of them in several places.
void random_pages(ByteSource& source, AttentionProblem& problem, CacheFeatures& cache, bool hostile) {
  const std::int32_t capacity = problem.max_seqlen_k;
  problem.page_size = source.choose({1, 2, 7, 16, 64, 256});
  problem.table_blocks = (capacity + problem.page_size - 1) / problem.page_size + source.integer(0, 1);
  problem.cache_rows = problem.table_rows * problem.table_blocks + source.integer(0, 2);
  const bool lies = hostile || source.one_in(4);
  cache.block_table = random_values(source, problem.table_rows * problem.table_blocks, problem.cache_rows - 1, lies);
  // As kvcache calls have it: all that the table can name.
  if (source.one_in(2)) problem.max_seqlen_k = problem.table_blocks * problem.page_size;
}

void random_new_keys(ByteSource& source, AttentionProblem& problem, Features& features, bool hostile) {
  if (source.one_in(2)) {
    problem.seqlen_new = source.choose({0, 1, 1, source.integer(1, 40)});
  } else {
    std::int32_t longest = 0;
    random_sequences(source, problem.batch, 40, hostile, features.cache.cu_seqlens_new, problem.total_new, longest);
  }
  features.cache.new_keys = random_layout(source);
  const std::int32_t pairs = problem.head_dim / 2;
  if (pairs == 0 || source.one_in(2)) return;
  problem.rotary_dim = 2 * source.integer(1, pairs);
  problem.rotary_interleaved = source.one_in(2);
  problem.rotary_rows = hostile ? source.integer(1, 50) : problem.key_capacity() + 1;
  if (source.one_in(3)) features.cache.rotary_seqlens = random_values(source, problem.batch, problem.rotary_rows, hostile);
}

}  // namespace

std::uint64_t ByteSource::bits(int bytes) {
  std::uint64_t value = 0;
  for (int i = 0; i < bytes && next_ != end_; ++i) value = value << 8 | *next_++;
  return value;
}

std::int32_t ByteSource::integer(std::int32_t low, std::int32_t high) {
  const auto choices = static_cast<std::uint64_t>(high - low) + 1;
  return low + static_cast<std::int32_t>(bits(choices > 256 ? 2 : 1) % choices);
}

std::vector<std::uint8_t> random_bytes(std::uint64_t seed, std::size_t size) {
  std::mt19937_64 engine(seed);
  std::vector<std::uint8_t> bytes(size);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(engine() >> 56);
  return bytes;
}

TestCall random_call(ByteSource& source, std::int64_t work) {
  AttentionProblem problem;
  Features features;
  random_sizes(source, problem);
  const std::int64_t scores = score_limit(problem, work);
  const bool hostile = source.one_in(4);
  const std::int32_t length_q = random_length(source);
  const auto limit_q = static_cast<std::int32_t>(std::min<std::int64_t>(length_q, scores));
  const auto limit_k = static_cast<std::int32_t>(std::min<std::int64_t>(300, scores / std::max(1, limit_q)));
  problem.varlen = source.one_in(2);
  if (problem.varlen) {
    random_sequences(source, problem.batch, limit_q, hostile, features.cu_seqlens_q, problem.total_q, problem.max_seqlen_q);
    random_sequences(source, problem.batch, limit_k, hostile, features.cu_seqlens_k, problem.total_k, problem.max_seqlen_k);
  } else {
    problem.max_seqlen_q = limit_q;
    problem.max_seqlen_k = std::min(random_length(source), limit_k);
  }
  if (source.one_in(4)) features.seqused_q = random_values(source, problem.batch, problem.max_seqlen_q, hostile);
  if (source.one_in(4)) features.seqused_k = random_values(source, problem.batch, problem.max_seqlen_k, hostile);
  random_options(source, problem, features);
  features.dlse = source.one_in(2);
  return TestCall(problem, features, source.bits(4));
}

TestCall random_cached_call(ByteSource& source, std::int64_t work) {
  AttentionProblem problem;
  Features features;
  CacheFeatures& cache = features.cache;
  random_sizes(source, problem);
  random_options(source, problem, features);
  if (source.one_in(2)) random_codes(source, problem, cache);
  problem.cached = true;
  problem.has_qv = source.one_in(4);
  // A quantised row is whole in memory, and no two rows of a cache share memory.
  for (Layout* layout : {&features.k, &features.v}) {
    const bool shares = *layout == Layout::same_batch || (cache.k_codes && *layout == Layout::strided_dim);
    if (shares) *layout = Layout::contiguous;
  }

  const bool hostile = source.one_in(3);
  const std::int64_t scores = score_limit(problem, work);
  const std::int32_t length_q = source.one_in(2) ? source.integer(1, 3) : random_length(source);
  const auto limit_q = static_cast<std::int32_t>(std::min<std::int64_t>(length_q, scores));
  const auto limit_k = static_cast<std::int32_t>(std::min<std::int64_t>(300, scores / std::max(1, limit_q)));
  problem.varlen = source.one_in(3);
  if (problem.varlen) {
    random_sequences(source, problem.batch, limit_q, hostile, features.cu_seqlens_q, problem.total_q, problem.max_seqlen_q);
  } else {
    problem.max_seqlen_q = limit_q;
  }
  if (source.one_in(6)) features.seqused_q = random_values(source, problem.batch, problem.max_seqlen_q, hostile);

  problem.max_seqlen_k = std::min(random_length(source), limit_k);
  problem.cache_rows = problem.table_rows = problem.batch;
  if (source.one_in(3)) {
    problem.cache_rows = problem.table_rows = source.integer(1, 4);
    cache.batch_idx = random_values(source, problem.batch, problem.cache_rows - 1, hostile);
  }
  if (source.one_in(2)) random_pages(source, problem, cache, hostile);
  if (!source.one_in(8)) features.seqused_k = random_values(source, problem.batch, problem.key_capacity(), hostile);
  if (source.one_in(3)) cache.leftpad = random_values(source, problem.batch, problem.key_capacity() / 2, hostile);
  if (source.one_in(2)) random_new_keys(source, problem, features, hostile);
  return TestCall(problem, features, source.bits(4));
}

}  // namespace flash_attn::test
