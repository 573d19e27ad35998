// Included once by each src/cpu/levels/*.cpp, which defines FA_LEVEL, FA_VECTOR_BYTES and FA_VECTOR_REGISTERS: all kernels of a
// level and its table.
#pragma once

#include "cpu/append_kernel.h"
#include "cpu/backward_kernel.h"
#include "cpu/decode_kernel.h"
#include "cpu/forward_kernel.h"
#include "cpu/mask_gradient_kernel.h"

#define FA_JOIN_(a, b) a##b
#define FA_JOIN(a, b) FA_JOIN_(a, b)
#define FA_STRING_(a) #a
#define FA_STRING(a) FA_STRING_(a)

namespace flash_attn::cpu {
namespace FA_LEVEL {
namespace {

// The kernel of the operand that suits a pass. The numbers of a quantised cache are not bfloat16.
#define FA_CHOOSE_OPERAND(kernel, of_bfloat16, pass, ...)                                                        \
  ((pass).problem->dtype == DType::bfloat16 && !(pass).inputs->cache.k.scales ? kernel<of_bfloat16>(__VA_ARGS__) \
                                                                              : kernel<Float32Operand>(__VA_ARGS__))

void run_pack_keys_values(const ForwardPass& pass, const Unit& unit, std::int32_t block, float* packed) {
  FA_CHOOSE_OPERAND(pack_keys_values, ForwardBfloat16, pass, pass, unit, block, packed);
}
void run_forward_rows(const ForwardPass& pass, const ForwardTask& task, float* scratch) {
  FA_CHOOSE_OPERAND(forward_rows, ForwardBfloat16, pass, pass, task, scratch);
}
BackwardBlocks run_backward_blocks(const BackwardPass& pass) {
  return FA_CHOOSE_OPERAND(backward_blocks, BackwardBfloat16, pass, pass);
}
void run_prepare_rows(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, float* rows) {
  FA_CHOOSE_OPERAND(prepare_rows, BackwardBfloat16, pass, pass, unit, row_begin, rows);
}
void run_add_sink_gradient(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, const float* rows,
                           double* dsink) {
  FA_CHOOSE_OPERAND(add_sink_gradient, BackwardBfloat16, pass, pass, unit, row_begin, rows, dsink);
}
void run_backward_keys(const BackwardPass& pass, const BackwardTask& task, float* scratch) {
  FA_CHOOSE_OPERAND(backward_keys, BackwardBfloat16, pass, pass, task, scratch);
}
void run_write_query_gradients(const BackwardPass& pass, const Unit& unit, std::int32_t row_begin, const float* dq) {
  FA_CHOOSE_OPERAND(write_query_gradients, BackwardBfloat16, pass, pass, unit, row_begin, dq);
}
void run_add_mask_gradient(const BackwardPass& pass, const MaskGradientTask& task, float* scratch) {
  FA_CHOOSE_OPERAND(add_mask_gradient, BackwardBfloat16, pass, pass, task, scratch);
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
