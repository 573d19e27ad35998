// The products of decode from an int8 cache, for 16-bit queries: in integers.
#pragma once

#include "cpu/decode_products.h"
#include "cpu/integer_products.h"
#include "cpu/integer_rows.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

inline void read_integer_rows(const ConstTensor& tensor, const RowPanel& panel, const Unit& unit, int dim, float* words,
                              std::int64_t stride, float* factors) {
  float row[round_up(max_head_dim_of_tensor, lanes)];
  for (int lane = 0; lane < panel.rows; ++lane, words += stride) {
    const std::int64_t offset = panel.offset(unit, tensor.strides, lane);
    read_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, dim, row);
    for (int d = dim; d < round_up(dim, lanes); ++d) row[d] = 0.0f;
    const float limit = dim < 512 ? largest_int16 : largest_int16 / 2;  // |q . k| stays below 2^31, whatever the key
    factors[lane] = quantize_query(row, dim, limit, reinterpret_cast<std::int16_t*>(words));
  }
}

inline void read_integer_queries(const DecodePass& pass, const Unit& unit, const RowPanel& panel, int row, DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const AttentionInputs& inputs = *pass.inputs;
  const DecodeSizes& sizes = state.sizes;
  read_integer_rows(inputs.q, panel, unit, problem.head_dim, state.q + row * sizes.q_stride, sizes.q_stride,
                    state.q_factors + row);
  if (!problem.has_qv) return;
  read_integer_rows(inputs.qv, panel, unit, problem.head_dim_v, state.qv + row * sizes.qv_stride, sizes.qv_stride,
                    state.qv_factors + row);
}

// scores = scale K Q^T of a block, or added to what is there; K is v where Q is qv.
template <class Later>
__attribute__((noinline)) void multiply_integer_keys(const DecodePass& pass, const Unit& unit, const KeyTensor& source,
                                                     const KeySlots& keys, const float* q, std::int64_t q_stride,
                                                     const float* factors, bool add, DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const std::int64_t stride = state.sizes.score_stride;
  const int rows = unit.rows_of_head();
  const int steps = Later::steps(keys.count);
  const auto* words = reinterpret_cast<const std::int32_t*>(q);
  auto* integers = reinterpret_cast<std::int32_t*>(state.words);
  const auto visit = [&](int step, int head, const ByteRows<Later>& key_rows, Later later) FA_INLINE_IF_FAST {
    for_each_row_tile(rows, [&](int tile, auto count) FA_INLINE_IF_FAST {
      const int row = head * rows + tile;
      integer_dots<count>(key_rows, later, words + row * q_stride, q_stride, source.dim, integers + step * stride + row,
                          steps * stride);
    });
  };
  walk<Later>(unit, BlockBytes<DType::int8>{source, keys, unit.kv_head}, values_of(problem, *pass.inputs), keys, visit);
  read_scales(pass, unit, source, keys, state.numbers);
  scale_scores(unit, keys.count, state.numbers, integers, factors, ScoreScale(problem).query, add, state.scores, stride);
}

template <class Later>
inline void score_integers(const DecodePass& pass, const Unit& unit, const KeySlots& keys, DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const DecodeSizes& sizes = state.sizes;
  const KeyTensor k = keys_of(problem, *pass.inputs);
  multiply_integer_keys<Later>(pass, unit, k, keys, state.q, sizes.q_stride, state.q_factors, false, state);
  if (!problem.has_qv) return;
  const KeyTensor v = values_of(problem, *pass.inputs);
  multiply_integer_keys<Later>(pass, unit, v, keys, state.qv, sizes.qv_stride, state.qv_factors, true, state);
}

template <class Later>
inline void add_integer_values_of_block(const DecodePass& pass, const Unit& unit, const KeySlots& keys, const KeySlots& next,
                                        DecodeState& state) {
  const KeyTensor k = keys_of(*pass.problem, *pass.inputs);
  const KeyTensor v = values_of(*pass.problem, *pass.inputs);
  const DecodeSizes& sizes = state.sizes;
  const int rows = unit.rows_of_head();
  const int steps = Later::steps(keys.count);
  read_scales(pass, unit, v, keys, state.numbers);
  quantize_weights(unit, keys.count, state.numbers, state.scores, sizes.score_stride, state.row_units);
  const auto* p = reinterpret_cast<const std::int32_t*>(state.scores);
  StepWeights<std::int32_t, Later> weights;
  const auto visit = [&](int step, int head, const ByteRows<Later>& values, Later later) FA_INLINE_IF_FAST {
    weights.find(p, sizes.score_stride, keys.count, step);
    const BlockSums block = {state.sums, state.o, sizes.o_stride, state.alpha, state.row_units, step == 0, step == steps - 1};
    for_each_row_tile(rows, [&](int tile, auto count) FA_INLINE_IF_FAST {
      add_integer_values<count>(values, later, weights, head * rows + tile, v.dim, block);
    });
  };
  walk<Later>(unit, BlockBytes<DType::int8>{v, keys, unit.kv_head}, k, next, visit);
}

inline void order_integer_dims(float* o, int dim) {
  for (int d = 0; d < dim; d += int8_chunk) IntegerOperand::order_dims(o + d);
}

// P V takes more keys a step, since O is read and written once a step.
template <class Later>
constexpr DecodeProducts integer_products = {
    .keys_of_block = Later::keys_of_block,
    .read_queries = read_integer_queries,
    .score_block = score_integers<Later>,
    .value_block = add_integer_values_of_block<typename Later::FourKeys>,
    .order_dims = order_integer_dims,
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
