#include "ops/call/check_kvcache.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "ops/call/inputs.h"
#include "ops/call/require.h"

namespace flash_attn {
namespace {

using Values = std::optional<std::vector<std::int32_t>>;

Values values_of(const std::optional<mx::array>& array) { return array ? values_if_ready(*array) : std::nullopt; }

mx::Shape without_last(const mx::Shape& shape) { return {shape.begin(), shape.end() - 1}; }

struct CacheTensor {
  std::string name;
  const mx::array& data;
  const std::optional<mx::array>& scales;
  const std::optional<mx::array>& biases;
};

void check_int8(const CacheTensor& cache) {
  const std::string scale_name = std::string(1, cache.name[0]) + "_scale";
  require_dtype(cache.name, cache.data, mx::int8);
  require_dtype(scale_name, *cache.scales, mx::float32);
  require_shape(scale_name, *cache.scales, without_last(cache.data.shape()), cache.name + "'s without its last axis");
}

/// `dim`: values a row must stand for; 0: any.
void check_triple(const CacheTensor& cache, int dim) {
  require_dtype(cache.name, cache.data, mx::uint32);
  require_floating(cache.name + " scales", *cache.scales);
  require_rank(cache.name + " scales", *cache.scales, 4, "as the codes");
  if (dim == 0) dim = cache.scales->shape(-1) * quantization_group;
  if (dim % quantization_group != 0) {
    fail_shape(cache.name, cache.data, text("a head dim that is a multiple of the group size, ", quantization_group));
  }
  mx::Shape groups = cache.data.shape();
  groups.back() = dim / quantization_group;
  require_shape(cache.name + " scales", *cache.scales, groups, text("one for every ", quantization_group, " head dims"));
  require_dtype(cache.name + " biases", *cache.biases, cache.scales->dtype());
  require_shape(cache.name + " biases", *cache.biases, groups, "that of the scales");
  const int words = cache.data.shape(-1);
  if (words * 4 != dim && words * 8 != dim) {
    fail_shape(cache.name, cache.data,
               text(dim / 4, " words of 8-bit codes or ", dim / 8, " words of 4-bit codes along its last axis"));
  }
}

/// Of q's dtype, int8 with scales, or MLX's triple; `dim` as in check_triple.
void check_cache_dtype(const mx::array& q, const CacheTensor& cache, int dim) {
  if (cache.biases) return check_triple(cache, dim);
  if (cache.scales) return check_int8(cache);
  if (cache.data.dtype() == q.dtype()) return;
  const char* hint = cache.data.dtype() == mx::int8 ? "k_scale and v_scale, or q's dtype " : "q's dtype ";
  fail<TypeError>(cache.name, text("dtype ", cache.data.dtype()), text(hint, q.dtype()));
}

void check_per_sequence(const AttentionProblem& problem, const std::string& name, const std::optional<mx::array>& array) {
  if (!array) return;
  require_dtype(name, *array, mx::int32);
  require_shape(name, *array, {problem.batch}, "(batch,)");
}

void check_rotary(const AttentionProblem& problem, const mx::array& q, const OptionalInputs& optional) {
  if (!optional.rotary_cos && !optional.rotary_sin) {
    if (optional.rotary_seqlens) fail<std::invalid_argument>("rotary_seqlens", "an array", "rotary_cos and rotary_sin with it");
    return;
  }
  if (!optional.rotary_cos || !optional.rotary_sin) {
    fail<std::invalid_argument>(optional.rotary_cos ? "rotary_sin" : "rotary_cos", "none", "both or neither");
  }
  if (!optional.k_new) fail<std::invalid_argument>("rotary_cos", "an array", "new keys k with it");
  const mx::array& cos = *optional.rotary_cos;
  require_rank("rotary_cos", cos, 2, "(rows, rotary_dim / 2)");
  for (const auto& [name, table] : {std::pair{"rotary_cos", cos}, std::pair{"rotary_sin", *optional.rotary_sin}}) {
    require_dtype(name, table, q.dtype());
    require_shape(name, table, cos.shape(), "the same for both");
  }
  const std::int64_t rotary_dim = 2 * std::int64_t{cos.shape(1)};
  if (rotary_dim == 0 || rotary_dim % 16 != 0 || rotary_dim > problem.head_dim) {
    fail_shape("rotary_cos", cos,
               text("a rotary dim, twice its last axis, that is a multiple of 16 and at most ", problem.head_dim));
  }
  if (cos.shape(0) < problem.key_capacity() || cos.shape(0) < 1) {
    fail_shape("rotary_cos", cos, text("a row for each of the ", problem.key_capacity(), " slots of a sequence"));
  }
  check_per_sequence(problem, "rotary_seqlens", optional.rotary_seqlens);
}

/// `meaning`: of the range; put together only for an error.
template <class... Meaning>
void require_in_range(const char* name, std::int64_t got, std::int64_t low, std::int64_t high, std::size_t batch,
                      const Meaning&... meaning) {
  if (got < low || got > high) {
    fail<std::invalid_argument>(name, text(got, " for sequence ", batch), text(low, " to ", high, ", ", meaning...));
  }
}

/// Blocks of one sequence: those before `first_new` are read, the others written.
void check_blocks(const AttentionProblem& problem, const std::vector<std::int32_t>& table, std::int64_t table_row,
                  std::int64_t used_slots, std::int64_t first_new_slot, std::size_t batch) {
  const std::int64_t blocks = (used_slots + problem.page_size - 1) / problem.page_size;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int32_t page = table[static_cast<std::size_t>(table_row * problem.table_blocks + block)];
    const bool is_written = first_new_slot < used_slots && block >= first_new_slot / problem.page_size;
    if (page == -1 && !is_written) continue;
    if (page < 0 || page >= problem.cache_rows) {
      fail<std::invalid_argument>(
          "block_table", text("page ", page, " for block ", block, " of sequence ", batch),
          text("0 to ", problem.cache_rows - 1, is_written ? " where tokens are appended" : ", or -1 for none"));
    }
  }
}

}  // namespace

void check_cached_tensors(const mx::array& q, const mx::array& k, const mx::array& v, const OptionalInputs& optional,
                          bool varlen, const ArgumentNames& names) {
  require_rank(names.q, q, varlen ? 3 : 4, varlen ? "(total_q, heads, head_dim)" : "(batch, seqlen_q, heads, head_dim)");
  const char* layout = optional.block_table ? "(pages, page_size, heads_k, dim)" : "(rows, capacity, heads_k, dim)";
  require_rank(names.k, k, 4, layout);
  require_rank(names.v, v, 4, layout);
  require_floating(names.q, q);
  const int dim = q.shape(-1);
  if (dim < 1 || dim > max_head_dim_of_tensor) fail_shape(names.q, q, text("a head dim of 1 to ", max_head_dim_of_tensor));
  if (q.shape(-2) < 1) fail_shape(names.q, q, "at least one head");
  check_cache_dtype(q, {names.k, k, optional.k_scales, optional.k_biases}, dim);
  check_cache_dtype(q, {names.v, v, optional.v_scales, optional.v_biases}, 0);
  if (k.dtype() != v.dtype()) fail<TypeError>(names.v, text("dtype ", v.dtype()), text("that of ", names.k, ", ", k.dtype()));

  if (!optional.k_biases && k.shape(-1) != dim) fail_shape(names.k, k, text("the head dim of ", names.q, ", ", dim));
  const int dim_v = values_of_codes(v, optional.v_biases);
  if (dim_v < 1 || dim_v > max_head_dim_of_tensor) fail_shape(names.v, v, text("a head dim of 1 to ", max_head_dim_of_tensor));
  if (without_last(v.shape()) != without_last(k.shape())) {
    fail_shape(names.v, v, text("the shape of ", names.k, ", ", text_of(k.shape()), ", but for its last axis"));
  }
  if (k.shape(-2) < 1 || q.shape(-2) % k.shape(-2) != 0) {
    fail_shape(names.k, k, text("a number of heads that divides that of ", names.q, ", ", q.shape(-2)));
  }
}

void check_cache_layout(const AttentionProblem& problem, const OptionalInputs& optional, const char* lengths_name) {
  if (optional.block_table) {
    const mx::array& table = *optional.block_table;
    require_dtype("block_table", table, mx::int32);
    require_rank("block_table", table, 2, "(batch, blocks)");
    if (problem.page_size < 1) fail<std::invalid_argument>("k_cache", "pages of 0 slots", "a page size of at least 1");
    if (!optional.cache_batch_idx && table.shape(0) != problem.batch) {
      fail_shape("block_table", table, text("a row for each of the ", problem.batch, " sequences"));
    }
  } else if (!optional.cache_batch_idx && problem.cache_rows != problem.batch) {
    fail<std::invalid_argument>("k_cache", text(problem.cache_rows, " rows"),
                                text("one for each of the ", problem.batch, " sequences of q, or cache_batch_idx"));
  }
  check_per_sequence(problem, lengths_name, optional.seqused_k);
  check_per_sequence(problem, "cache_batch_idx", optional.cache_batch_idx);
  check_per_sequence(problem, "cache_leftpad", optional.cache_leftpad);
}

void check_new_keys(const AttentionProblem& problem, const mx::array& q, const OptionalInputs& optional,
                    const ArgumentNames& names) {
  check_rotary(problem, q, optional);
  if (!optional.k_new && !optional.v_new) {
    if (optional.cu_seqlens_k_new) fail<std::invalid_argument>("cu_seqlens_k_new", "an array", "new keys k with it");
    return;
  }
  if (!optional.k_new || !optional.v_new) {
    fail<std::invalid_argument>(optional.k_new ? names.v_new : names.k_new, "none", "both or neither");
  }
  if (!optional.seqused_k)
    fail<std::invalid_argument>("cache_seqlens", "none", "the lengths behind which k and v are appended");
  const mx::array& k_new = *optional.k_new;
  const bool packed = optional.cu_seqlens_k_new.has_value();
  const char* layout = packed ? "(total_new, heads_k, dim)" : "(batch, seqlen_new, heads_k, dim)";
  require_rank(names.k_new, k_new, packed ? 3 : 4, layout);
  const auto shape = [&](int dim) {
    return packed ? mx::Shape{k_new.shape(0), problem.heads_k, dim}
                  : mx::Shape{problem.batch, k_new.shape(1), problem.heads_k, dim};
  };
  require_dtype(names.k_new, k_new, q.dtype());
  require_dtype(names.v_new, *optional.v_new, q.dtype());
  require_shape(names.k_new, k_new, shape(problem.head_dim), layout);
  require_shape(names.v_new, *optional.v_new, shape(problem.head_dim_v), layout);
  if (packed) {
    require_dtype("cu_seqlens_k_new", *optional.cu_seqlens_k_new, mx::int32);
    require_shape("cu_seqlens_k_new", *optional.cu_seqlens_k_new, {problem.batch + 1}, "(batch + 1,)");
  } else if (problem.seqlen_new > problem.key_capacity()) {
    fail_shape(names.k_new, k_new, text("at most ", problem.key_capacity(), " new keys a sequence, the capacity of the cache"));
  }
  // Upstream's bound on queries when keys are appended.
  if (!problem.varlen && problem.max_seqlen_q > problem.key_capacity() && problem.batch > 0) {
    fail_shape("q", q,
               text("at most ", problem.key_capacity(), " queries a sequence, the capacity of the cache, when k is given"));
  }
}

void check_cache_values(const AttentionProblem& problem, const OptionalInputs& optional, const char* lengths_name) {
  const std::int64_t capacity = problem.key_capacity();
  const std::int32_t cache_rows = problem.page_size > 0 ? problem.table_rows : problem.cache_rows;
  const Values lengths = values_of(optional.seqused_k);
  const Values batch_idx = values_of(optional.cache_batch_idx);
  const Values leftpad = values_of(optional.cache_leftpad);
  const Values new_starts = values_of(optional.cu_seqlens_k_new);
  const Values rotary_seqlens = values_of(optional.rotary_seqlens);
  const Values table = values_of(optional.block_table);
  for (std::size_t batch = 0; batch < static_cast<std::size_t>(problem.batch); ++batch) {
    if (batch_idx) require_in_range("cache_batch_idx", batch_idx->at(batch), 0, cache_rows - 1, batch, "rows of the cache");
    std::int64_t new_keys = optional.cu_seqlens_k_new ? 0 : problem.seqlen_new;
    if (new_starts) {
      new_keys = std::int64_t{new_starts->at(batch + 1)} - new_starts->at(batch);
      require_in_range("cu_seqlens_k_new", new_starts->at(batch), 0, problem.total_new, batch, "rows of k");
      require_in_range("cu_seqlens_k_new", new_starts->at(batch + 1), new_starts->at(batch), problem.total_new, batch,
                       "its end in the rows of k");
    }
    if (optional.seqused_k && !lengths) continue;
    const std::int64_t length = lengths ? lengths->at(batch) : capacity;
    if (new_keys > 0) {
      require_in_range(lengths_name, length, 0, capacity - new_keys, batch, "so that ", new_keys,
                       " new keys fit into the capacity of ", capacity);
    } else {
      require_in_range(lengths_name, length, 0, capacity, batch, "the capacity of the cache");
    }
    if (leftpad) require_in_range("cache_leftpad", leftpad->at(batch), 0, length + new_keys, batch, "slots in use");
    if (rotary_seqlens) {
      require_in_range("rotary_seqlens", rotary_seqlens->at(batch), 0, problem.rotary_rows - new_keys, batch,
                       "rows of rotary_cos before the new keys'");
    }
    if (!table || (optional.cache_batch_idx && !batch_idx)) continue;
    check_blocks(problem, *table, batch_idx ? batch_idx->at(batch) : static_cast<std::int64_t>(batch), length + new_keys,
                 length, batch);
  }
}

void check_pages(const mx::array& k_cache, const mx::array& v_cache, const mx::array& block_table,
                 const mx::array& cache_seqlens, int seqlen_new) {
  const char* layout = "(pages, page_size, heads_k, dim)";
  require_rank("k_cache", k_cache, 4, layout);
  require_rank("v_cache", v_cache, 4, layout);
  if (v_cache.dtype() != k_cache.dtype())
    fail<TypeError>("v_cache", text("dtype ", v_cache.dtype()), text("that of k_cache, ", k_cache.dtype()));
  if (without_last(v_cache.shape()) != without_last(k_cache.shape())) {
    fail_shape("v_cache", v_cache, text("the shape of k_cache, ", text_of(k_cache.shape()), ", but for its last axis"));
  }
  require_dtype("block_table", block_table, mx::int32);
  require_rank("block_table", block_table, 2, "(batch, blocks)");
  OptionalInputs optional;
  optional.block_table = block_table;
  optional.seqused_k = cache_seqlens;
  AttentionProblem problem;
  problem.cached = true;
  problem.batch = block_table.shape(0);
  problem.cache_rows = k_cache.shape(0);
  problem.page_size = k_cache.shape(1);
  problem.table_rows = block_table.shape(0);
  problem.table_blocks = block_table.shape(1);
  problem.max_seqlen_k = std::numeric_limits<std::int32_t>::max();
  problem.seqlen_new = seqlen_new;
  check_cache_layout(problem, optional, "cache_seqlens");
  check_cache_values(problem, optional, "cache_seqlens");
}

}  // namespace flash_attn
