// The products of decode in float32.
#pragma once

#include "cpu/decode_products.h"
#include "cpu/row_dots.h"
#include "cpu/row_values.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Rows of q as rows of a cache's `dtype` are read, zeros up to a whole vector.
template <DType dtype>
inline void read_float_rows(const ConstTensor& tensor, const RowPanel& panel, const Unit& unit, int dim, std::int64_t stride,
                            float* rows) {
  for (int lane = 0; lane < panel.rows; ++lane, rows += stride) {
    const std::int64_t offset = panel.offset(unit, tensor.strides, lane);
    read_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, dim, rows);
    pair_dims<dtype>(rows, dim);
    std::memset(rows + dim, 0, static_cast<std::size_t>(stride - dim) * sizeof(float));
  }
}

template <DType k_dtype, DType v_dtype>
inline void read_float_queries(const DecodePass& pass, const Unit& unit, const RowPanel& panel, int row, DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const AttentionInputs& inputs = *pass.inputs;
  const DecodeSizes& sizes = state.sizes;
  read_float_rows<k_dtype>(inputs.q, panel, unit, problem.head_dim, sizes.q_stride, state.q + row * sizes.q_stride);
  if (!problem.has_qv) return;
  read_float_rows<v_dtype>(inputs.qv, panel, unit, problem.head_dim_v, sizes.qv_stride, state.qv + row * sizes.qv_stride);
}

// scores = scale K Q^T of a block, or added to what is there; K is v where Q is qv.
template <class Later, DType dtype>
__attribute__((noinline)) void multiply_float_keys(const DecodePass& pass, const Unit& unit, const KeyTensor& source,
                                                   const KeySlots& keys, const float* q, std::int64_t q_stride, bool add,
                                                   DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const float scale = ScoreScale(problem).query;
  const std::int64_t stride = state.sizes.score_stride;
  const int rows = unit.rows_of_head();
  const int steps = Later::steps(keys.count);
  // Inlined whatever the compiler thinks of it: out of line it takes a tenth longer.
  const auto visit = [&](int step, int head, const KeyRows<dtype, Later>& key_rows, Later later) FA_INLINE_IF_FAST {
    for_each_row_tile(rows, [&](int tile, auto count) FA_INLINE_IF_FAST {
      const int row = head * rows + tile;
      dots<dtype, count>(key_rows.row, later, q + row * q_stride, q_stride, source.dim, scale, add,
                         state.scores + step * stride + row, steps * stride);
    });
  };
  const KeyTensor next = values_of(problem, *pass.inputs);
  walk<Later>(unit, BlockRows<dtype>(pass, unit, source, keys, state.numbers), next, keys, visit);
}

template <class Later, DType k_dtype, DType v_dtype>
inline void score_floats(const DecodePass& pass, const Unit& unit, const KeySlots& keys, DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const DecodeSizes& sizes = state.sizes;
  const KeyTensor k = keys_of(problem, *pass.inputs);
  multiply_float_keys<Later, k_dtype>(pass, unit, k, keys, state.q, sizes.q_stride, false, state);
  if (!problem.has_qv) return;
  const KeyTensor v = values_of(problem, *pass.inputs);
  multiply_float_keys<Later, v_dtype>(pass, unit, v, keys, state.qv, sizes.qv_stride, true, state);
}

template <class Later, DType dtype>
inline void add_float_values(const DecodePass& pass, const Unit& unit, const KeySlots& keys, const KeySlots& next,
                             DecodeState& state) {
  const KeyTensor k = keys_of(*pass.problem, *pass.inputs);
  const KeyTensor v = values_of(*pass.problem, *pass.inputs);
  const std::int64_t stride = state.sizes.score_stride;
  const int rows = unit.rows_of_head();
  if constexpr (multiplies_pairs<dtype>) pair_weights<Later>(state.scores, stride, keys.count, state.words);
  StepWeights<float, Later> weights;
  const auto visit = [&](int step, int head, const KeyRows<dtype, Later>& values, Later later) FA_INLINE_IF_FAST {
    weights.find(state.scores, stride, keys.count, step);
    for_each_row_tile(rows, [&](int tile, auto count) FA_INLINE_IF_FAST {
      const int row = head * rows + tile;
      const float* rescale = step == 0 ? state.alpha + row : nullptr;
      float* o = state.o + row * state.sizes.o_stride;
      add_values<dtype, count>(values.row, later,
                               OutputRows<Later>{o, state.sizes.o_stride, rescale, weights, row, state.words - state.scores},
                               v.dim);
    });
  };
  walk<Later>(unit, BlockRows<dtype>(pass, unit, v, keys, state.numbers), k, next, visit);
}

template <class Later, class ValuesLater, DType k_dtype, DType v_dtype = k_dtype>
constexpr DecodeProducts float_products = {
    .keys_of_block = Later::keys_of_block,
    .read_queries = read_float_queries<k_dtype, v_dtype>,
    .score_block = score_floats<Later, k_dtype, v_dtype>,
    .value_block = add_float_values<ValuesLater, v_dtype>,
    .order_dims = unpair_dims<v_dtype>,
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
