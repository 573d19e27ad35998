// Included once by each src/cpu/levels/*.cpp, which defines FA_LEVEL, FA_VECTOR_BYTES and FA_VECTOR_REGISTERS: all kernels of a
// level and its table.
#pragma once

#include "cpu/append_kernel.h"
#include "cpu/backward_kernel.h"
#include "cpu/decode_kernel.h"
#include "cpu/forward_kernel.h"
#include "cpu/mask_gradient_kernel.h"

#if !defined(FA_TILES_FOR_FEW)  // 1: matrix tiles for every shape, so that tests reach them
#define FA_TILES_FOR_FEW 0
#endif

#define FA_JOIN_(a, b) a##b
#define FA_JOIN(a, b) FA_JOIN_(a, b)
#define FA_STRING_(a) #a
#define FA_STRING(a) FA_STRING_(a)

namespace flash_attn::cpu {
namespace FA_LEVEL {
namespace {

// About how many keys a row meets, or rows a key: the fewer of both.
int mean_pairs(const AttentionProblem& problem) {
  const auto at_most = [](std::int64_t a, std::int64_t b) { return a < b ? a : b; };
  const std::int64_t rows = std::int64_t{problem.max_seqlen_q} * problem.group();
  std::int64_t keys = problem.causal ? problem.max_seqlen_k / 2 : problem.max_seqlen_k;
  if (problem.causal && problem.window_left >= 0) keys = at_most(keys, std::int64_t{problem.window_left} + 1);
  const std::int64_t rows_of_key = rows * keys / max_of(problem.max_seqlen_k, 1);
  return static_cast<int>(at_most(at_most(keys, rows_of_key), highest_int));
}

// Several terms take longer to pack, and pay where a row or key meets so many others.
constexpr int pairs_for_two_terms = 96;
constexpr int pairs_for_three_terms = 300;

// visit(the operand that suits a pass). The numbers of a quantised cache are not bfloat16.
template <class Pass, class Visit>
auto with_operand(const Pass& pass, const Visit& visit) {
  const AttentionProblem& problem = *pass.problem;
  const int pairs = FA_TILES_FOR_FEW ? highest_int : mean_pairs(problem);
  if (problem.dtype == DType::float32) {
    return pairs >= pairs_for_three_terms ? visit(Operands::Float32{}) : visit(Float32Operand{});
  }
  if (problem.dtype == DType::bfloat16 && !pass.inputs->cache.k.scales) return visit(Operands::Bfloat16{});
  return pairs >= pairs_for_two_terms ? visit(Operands::Float16{}) : visit(Float32Operand{});
}

void run_pack_keys_values(const ForwardPass& pass, const Unit& unit, std::int32_t block, float* packed) {
  with_operand(pass, [&](auto of) { pack_keys_values<decltype(of)>(pass, unit, block, packed); });
}
void run_forward_rows(const ForwardPass& pass, const ForwardTask& task, float* scratch) {
  with_operand(pass, [&](auto of) { forward_rows<decltype(of)>(pass, task, scratch); });
}
BackwardBlocks run_backward_blocks(const BackwardPass& pass) {
  return with_operand(pass, [&](auto of) { return backward_blocks<decltype(of)>(pass); });
}
void run_prepare_rows(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, float* rows) {
  with_operand(pass, [&](auto of) { prepare_rows<decltype(of)>(pass, unit, row_begin, rows); });
}
void run_add_sink_gradient(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, const float* rows,
                           double* dsink) {
  with_operand(pass, [&](auto of) { add_sink_gradient<decltype(of)>(pass, unit, row_begin, rows, dsink); });
}
void run_backward_keys(const BackwardPass& pass, const BackwardTask& task, float* scratch) {
  with_operand(pass, [&](auto of) { backward_keys<decltype(of)>(pass, task, scratch); });
}
void run_write_query_gradients(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, const float* dq) {
  with_operand(pass, [&](auto of) { write_query_gradients<decltype(of)>(pass, unit, row_begin, dq); });
}
void run_add_mask_gradient(const BackwardPass& pass, const MaskGradientTask& task, float* scratch) {
  with_operand(pass, [&](auto of) { add_mask_gradient<decltype(of)>(pass, task, scratch); });
}

}  // namespace
}  // namespace FA_LEVEL

const Kernels FA_JOIN(FA_LEVEL, _kernels) = {
    .name = FA_STRING(FA_LEVEL),
    .panel_rows = FA_LEVEL::panel_rows,
    .forward_key_tile = FA_LEVEL::forward_key_tile,
    .packed_block_size = FA_LEVEL::packed_block_size,
    .pack_keys_values = FA_LEVEL::run_pack_keys_values,
    .forward_scratch_size = FA_LEVEL::forward_scratch_size,
    .forward_rows = FA_LEVEL::run_forward_rows,
    .decode_scratch_size = FA_LEVEL::decode_scratch_size,
    .partial_row_size = FA_LEVEL::partial_row_size,
    .decode = FA_LEVEL::decode,
    .combine_partials = FA_LEVEL::combine_partials,
    .append_rows = FA_LEVEL::append_rows,
    .rotate_rows = FA_LEVEL::rotate_rows,
    .backward_blocks = FA_LEVEL::run_backward_blocks,
    .prepare_rows = FA_LEVEL::run_prepare_rows,
    .add_sink_gradient = FA_LEVEL::run_add_sink_gradient,
    .backward_keys = FA_LEVEL::run_backward_keys,
    .write_query_gradients = FA_LEVEL::run_write_query_gradients,
    .add_mask_gradient = FA_LEVEL::run_add_mask_gradient,
};

}  // namespace flash_attn::cpu
