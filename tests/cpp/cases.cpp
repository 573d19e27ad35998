#include "cases.h"

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

}  // namespace

void PrintTo(const Case& test_case, std::ostream* stream) { *stream << test_case.name; }

const std::vector<Case>& feature_cases() { return all_cases; }

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

}  // namespace flash_attn::test
