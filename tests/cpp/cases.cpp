#include "cases.h"

#include <limits>

namespace flash_attn::test {
namespace {

// Three sequences: the longest, one query over half the keys, half the queries over one key.
void make_varlen(AttentionProblem& problem, Features& features) {
  const std::int32_t q = problem.max_seqlen_q;
  const std::int32_t k = problem.max_seqlen_k;
  problem.varlen = true;
  problem.batch = 3;
  features.cu_seqlens_q = {0, q, q + 1, q + 1 + q / 2};
  features.cu_seqlens_k = {1, 1 + k, 1 + k + k / 2, 2 + k + k / 2};
  problem.total_q = features.cu_seqlens_q.back() + 1;
  problem.total_k = features.cu_seqlens_k.back() + 1;
}

void add_mask(Features& features, DType dtype) {
  features.attn_mask = true;
  features.mask_dtype = dtype;
}

const std::vector<Case> all_cases = {
    {"plain", [](AttentionProblem&, Features&) {}},
    {"causal", [](AttentionProblem& problem, Features&) { problem.causal = true; }},
    {"window", [](AttentionProblem& problem, Features&) { problem.window_left = problem.window_right = 1; }},
    {"left_window", [](AttentionProblem& problem, Features&) { problem.window_left = problem.max_seqlen_k / 3; }},
    {"right_window", [](AttentionProblem& problem, Features&) { problem.window_right = 2; }},
    {"chunk", [](AttentionProblem& problem, Features&) { problem.attention_chunk = problem.max_seqlen_k / 2; }},
    {"softcap", [](AttentionProblem& problem, Features&) { problem.softcap = 0.5f; }},
    {"dropout", [](AttentionProblem& problem, Features&) { set_dropout(problem, 0.4); }},
    {"alibi", [](AttentionProblem&, Features& features) { features.alibi = true; }},
    {"alibi_per_batch", [](AttentionProblem&, Features& features) { features.alibi = features.alibi_per_batch = true; }},
    {"sink", [](AttentionProblem&, Features& features) { features.sink = true; }},
    {"bool_mask", [](AttentionProblem&, Features& features) { add_mask(features, DType::boolean); }},
    {"additive_mask", [](AttentionProblem&, Features& features) { add_mask(features, DType::float32); }},
    {"half_mask", [](AttentionProblem&, Features& features) { add_mask(features, DType::bfloat16); }},
    {"key_mask",
     [](AttentionProblem&, Features& features) {
       add_mask(features, DType::float32);
       features.mask_heads = features.mask_rows = false;
     }},
    {"row_mask",
     [](AttentionProblem&, Features& features) {
       add_mask(features, DType::float32);
       features.mask_batch = features.mask_keys = false;
     }},
    {"one_kv_head", [](AttentionProblem& problem, Features&) { problem.heads_k = 1; }},
    {"one_query_head_each", [](AttentionProblem& problem, Features&) { problem.heads_k = problem.heads_q; }},
    {"transposed_views",
     [](AttentionProblem&, Features& features) { features.q = features.k = features.v = features.out = Layout::heads_first; }},
    {"odd_views",
     [](AttentionProblem&, Features& features) {
       features.q = Layout::reversed;
       features.k = Layout::packed;
       features.v = Layout::strided_dim;
       features.out = Layout::gaps;
     }},
    {"streamed_results",
     [](AttentionProblem& problem, Features& features) {
       problem.head_dim = 64;
       problem.head_dim_v = 32;
       features.out = Layout::streamed;
     }},
    {"varlen", make_varlen},
    {"varlen_causal",
     [](AttentionProblem& problem, Features& features) {
       make_varlen(problem, features);
       problem.causal = true;
     }},
    {"seqused",
     [](AttentionProblem& problem, Features& features) {
       features.seqused_q.assign(static_cast<std::size_t>(problem.batch), problem.max_seqlen_q - 1);
       features.seqused_k.assign(static_cast<std::size_t>(problem.batch), 1);
       features.seqused_k[0] = problem.max_seqlen_k;
     }},
    {"everything",
     [](AttentionProblem& problem, Features& features) {
       make_varlen(problem, features);
       problem.causal = true;
       problem.window_left = problem.max_seqlen_k / 2;
       problem.softcap = 1.0f;
       set_dropout(problem, 0.3);
       features.alibi = features.alibi_per_batch = features.sink = true;
       add_mask(features, DType::float32);
       features.mask_heads = false;
     }},
};

constexpr std::int32_t highest = std::numeric_limits<std::int32_t>::max();
constexpr std::int32_t lowest = std::numeric_limits<std::int32_t>::min();

// Lengths of two sequences that leave the cache room.
void make_lengths(AttentionProblem& problem, Features& features) {
  features.seqused_k = {problem.max_seqlen_k - 50, problem.max_seqlen_k / 2};
}

void make_rotary(AttentionProblem& problem, bool interleaved) {
  problem.rotary_dim = problem.head_dim / 4 * 2;
  problem.rotary_interleaved = interleaved;
  problem.rotary_rows = problem.max_seqlen_k;
}

const std::vector<Case> all_cache_cases = {
    {"full", [](AttentionProblem&, Features&) {}},
    {"lengths", make_lengths},
    {"empty",
     [](AttentionProblem&, Features& features) {
       features.seqused_k = {0, 1};
     }},
    {"causal",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       problem.causal = true;
     }},
    {"batch_idx",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       problem.cache_rows = 4;
       features.cache.batch_idx = {3, 1};
     }},
    {"one_row_for_all",
     [](AttentionProblem&, Features& features) {
       features.cache.batch_idx = {1, 1};
     }},
    {"leftpad",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       features.cache.leftpad = {7, problem.max_seqlen_k / 2};
       problem.causal = true;
     }},
    {"lengths_that_lie",
     [](AttentionProblem&, Features& features) {
       features.seqused_k = {lowest, highest};
       features.cache.leftpad = {highest, lowest};
     }},
    {"rows_that_do_not_exist",
     [](AttentionProblem&, Features& features) {
       features.cache.batch_idx = {-1, 2};
     }},
    {"heads_first", [](AttentionProblem&, Features& features) { features.k = features.v = Layout::heads_first; }},
    {"pages_whose_values_are_heads_first",
     [](AttentionProblem& problem, Features& features) {
       make_pages(problem, features, 16);
       features.v = Layout::heads_first;
     }},
    {"pages_of_1", [](AttentionProblem& problem, Features& features) { make_pages(problem, features, 1); }},
    {"pages_of_7",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_pages(problem, features, 7);
       problem.window_left = 40;
     }},
    {"pages_of_16",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_pages(problem, features, 16);
       problem.causal = true;
     }},
    {"pages_longer_than_sequences", [](AttentionProblem& problem, Features& features) { make_pages(problem, features, 256); }},
    {"pages_missing",
     [](AttentionProblem& problem, Features& features) {
       make_pages(problem, features, 16);
       std::vector<std::int32_t>& table = features.cache.block_table;
       table[0] = -1;
       table[2] = lowest;
       table[3] = highest;
       table[static_cast<std::size_t>(problem.table_blocks)] = problem.cache_rows;
     }},
    {"pages_shared",
     [](AttentionProblem& problem, Features& features) {
       make_pages(problem, features, 16);
       std::vector<std::int32_t>& table = features.cache.block_table;
       for (std::size_t block = 0; block < 3; ++block)
         table[static_cast<std::size_t>(problem.table_blocks) + block] = table[block];
     }},
    {"pages_rows_and_leftpad",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_pages(problem, features, 16);
       features.cache.batch_idx = {1, 0};
       features.cache.leftpad = {17, 3};
     }},
    {"packed_queries",
     [](AttentionProblem& problem, Features& features) {
       const std::int32_t q = problem.max_seqlen_q;
       make_lengths(problem, features);
       problem.varlen = true;
       features.cu_seqlens_q = {1, 1 + q, 2 + q};
       problem.total_q = q + 4;
     }},
    {"qv", [](AttentionProblem& problem, Features&) { problem.has_qv = true; }},
    {"everything",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_pages(problem, features, 16);
       features.cache.block_table[1] = -1;
       features.cache.leftpad = {5, 0};
       problem.has_qv = problem.causal = true;
       problem.softcap = 1.0f;
       problem.attention_chunk = 64;
       set_dropout(problem, 0.3);
       features.alibi = features.alibi_per_batch = features.sink = true;
       add_mask(features, DType::float32);
     }},
};

const std::vector<Case> all_append_cases = {
    {"one_token",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       problem.seqlen_new = 1;
     }},
    {"many_tokens",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       problem.seqlen_new = 37;
     }},
    {"past_the_capacity",
     [](AttentionProblem& problem, Features& features) {
       features.seqused_k = {problem.max_seqlen_k - 2, problem.max_seqlen_k};
       problem.seqlen_new = 5;
     }},
    {"packed",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       features.cache.cu_seqlens_new = {2, 5, 16};
       problem.total_new = 18;
     }},
    {"packed_backwards",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       features.cache.cu_seqlens_new = {5, 2, highest};
       problem.total_new = 9;
     }},
    {"batch_idx_and_leftpad",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       problem.cache_rows = 3;
       problem.seqlen_new = 3;
       features.cache.batch_idx = {2, 0};
       features.cache.leftpad = {4, 60};
     }},
    {"views",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       problem.seqlen_new = 3;
       features.cache.new_keys = Layout::strided_dim;
       features.k = Layout::heads_first;
       features.v = Layout::gaps;
     }},
    {"pages_of_1",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_pages(problem, features, 1);
       problem.seqlen_new = 3;
     }},
    {"pages_of_16",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_pages(problem, features, 16);
       problem.seqlen_new = 37;
     }},
    {"pages_missing",
     [](AttentionProblem& problem, Features& features) {
       features.seqused_k = {14, 30};
       make_pages(problem, features, 16);
       features.cache.block_table[1] = -1;
       features.cache.block_table[static_cast<std::size_t>(problem.table_blocks) + 2] = highest;
       problem.seqlen_new = 37;
     }},
    {"rotary_interleaved",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_rotary(problem, true);
       problem.seqlen_new = 3;
     }},
    {"rotary_halves",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_rotary(problem, false);
       problem.seqlen_new = 3;
       problem.causal = true;
     }},
    {"rotary_lengths",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_rotary(problem, false);
       features.cache.rotary_seqlens = {3, 11};
       features.cache.leftpad = {9, 0};
       problem.seqlen_new = 3;
       problem.window_left = 30;
     }},
    {"rotary_lengths_that_lie",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_rotary(problem, true);
       features.cache.rotary_seqlens = {lowest, highest};
       problem.seqlen_new = 3;
       problem.causal = true;
     }},
    {"rotary_everything",
     [](AttentionProblem& problem, Features& features) {
       make_lengths(problem, features);
       make_pages(problem, features, 16);
       make_rotary(problem, true);
       features.cache.cu_seqlens_new = {0, 3, 10};
       problem.total_new = 10;
       problem.varlen = problem.causal = problem.has_qv = true;
       features.cu_seqlens_q = {0, 2, 2 + problem.max_seqlen_q};
       problem.total_q = 4 + problem.max_seqlen_q;
     }},
};

const std::vector<Storage> all_storages = {
    {"float32", DType::float32, {}, {}, DType::float32},
    {"bfloat16", DType::bfloat16, {}, {}, DType::float32},
    {"float16", DType::float16, {}, {}, DType::float32},
    {"int8", DType::float16, DType::int8, DType::int8, DType::float32},
    {"affine8", DType::float32, DType::affine8, DType::affine8, DType::float32},
    {"affine4", DType::bfloat16, DType::affine4, DType::affine4, DType::bfloat16},
    {"affine8_and_4", DType::float16, DType::affine8, DType::affine4, DType::float16},
    {"affine4_and_8", DType::float32, DType::affine4, DType::affine8, DType::bfloat16},
};

}  // namespace

void PrintTo(const Case& test_case, std::ostream* stream) { *stream << test_case.name; }

const std::vector<Case>& feature_cases() { return all_cases; }

const std::vector<Case>& cache_cases() { return all_cache_cases; }
const std::vector<Case>& append_cases() { return all_append_cases; }

void Storage::apply(AttentionProblem& problem, Features& features) const {
  problem.dtype = dtype;
  features.cache.k_codes = k_codes;
  features.cache.v_codes = v_codes;
  features.cache.scale_dtype = scale_dtype;
}

std::int32_t Storage::head_dim(std::int32_t wanted) const {
  const bool has_groups = k_codes && *k_codes != DType::int8;
  return has_groups ? (wanted + quantization_group - 1) / quantization_group * quantization_group : wanted;
}

void PrintTo(const Storage& storage, std::ostream* stream) { *stream << storage.name; }

const std::vector<Storage>& storages() { return all_storages; }

const char* name_of(DType dtype) {
  return dtype == DType::float32    ? "float32"
         : dtype == DType::bfloat16 ? "bfloat16"
         : dtype == DType::float16  ? "float16"
                                    : "bool";
}

AttentionProblem dense_problem(std::int32_t batch, std::int32_t seqlen_q, std::int32_t seqlen_k, std::int32_t head_dim,
                               std::int32_t head_dim_v) {
  AttentionProblem problem;
  problem.batch = batch;
  problem.heads_q = 4;
  problem.heads_k = 2;
  problem.max_seqlen_q = seqlen_q;
  problem.max_seqlen_k = seqlen_k;
  problem.head_dim = head_dim;
  problem.head_dim_v = head_dim_v;
  problem.softmax_scale = 0.7f;
  return problem;
}

AttentionProblem cached_problem(std::int32_t batch, std::int32_t seqlen_q, std::int32_t capacity, std::int32_t head_dim,
                                std::int32_t head_dim_v) {
  AttentionProblem problem = dense_problem(batch, seqlen_q, capacity, head_dim, head_dim_v);
  problem.cached = true;
  problem.cache_rows = batch;
  return problem;
}

void make_pages(AttentionProblem& problem, Features& features, std::int32_t page_size) {
  problem.page_size = page_size;
  problem.table_rows = problem.cache_rows;
  problem.table_blocks = (problem.max_seqlen_k + page_size - 1) / page_size;
  problem.cache_rows = problem.table_rows * problem.table_blocks + 2;
  features.cache.block_table.clear();
  for (std::int32_t page = problem.cache_rows - 1; page >= 2; --page) features.cache.block_table.push_back(page);
}

}  // namespace flash_attn::test
