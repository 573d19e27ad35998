// The products of decode from a cache of MLX's codes, for 16-bit queries: in integers.
#pragma once

#include "cpu/code_numbers.h"
#include "cpu/code_products.h"
#include "cpu/decode_products.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Of a unit: words [head][dim / 4][row][high, low], sums [row][groups] and factors [row].
struct UnitQueries {
  const float* words;
  const float* sums;
  const float* factors;
};

// q of a panel's rows, whose first is the unit's row `row`, as UnitQueries has it.
template <DType dtype>
inline void read_code_rows(const ConstTensor& tensor, const RowPanel& panel, const Unit& unit, int dim, int row, float* words,
                           float* sums, float* factors) {
  const int rows = unit.rows_of_head();
  const int groups = dim / quantization_group;
  float values[max_head_dim_of_tensor];
  std::int16_t numbers[round_up(max_head_dim_of_tensor, int8_chunk)];
  for (int lane = 0; lane < panel.rows; ++lane, ++row) {
    const std::int64_t offset = panel.offset(unit, tensor.strides, lane);
    read_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, dim, values);
    factors[row] = quantize_query(values, dim, largest_of_two_bytes, numbers);
    auto* of_row = reinterpret_cast<std::int32_t*>(words) + row / rows * rows * code_words(dim) + 2 * (row % rows);
    split_query<dtype>(numbers, factors[row], dim, of_row, 2 * rows, sums + row * groups);
  }
}

template <DType k_dtype, DType v_dtype>
inline void read_code_queries(const DecodePass& pass, const Unit& unit, const RowPanel& panel, int row, DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const AttentionInputs& inputs = *pass.inputs;
  read_code_rows<k_dtype>(inputs.q, panel, unit, problem.head_dim, row, state.q, state.q_sums, state.q_factors);
  if (!problem.has_qv) return;
  read_code_rows<v_dtype>(inputs.qv, panel, unit, problem.head_dim_v, row, state.qv, state.qv_sums, state.qv_factors);
}

// scores = scale K Q^T of a block, or added to what is there; K is v where Q is qv.
template <class Later, DType dtype>
__attribute__((noinline)) void multiply_codes(const DecodePass& pass, const Unit& unit, const KeyTensor& source,
                                              const KeySlots& keys, const UnitQueries& q, bool add, DecodeState& state) {
  const float scale = ScoreScale(*pass.problem).query;
  const std::int64_t stride = state.sizes.score_stride;
  const int rows = unit.rows_of_head();
  const int groups = groups_of(source);
  const int steps = Later::steps(keys.count);
  const std::int64_t places = std::int64_t{steps} * lanes;
  const std::int64_t biases = unit.kv_heads * groups * places;  // after the scales
  const BlockRows<dtype> block(pass, unit, source, keys, state.numbers);
  order_key_numbers(block, unit.kv_heads, block.scales, places, state.ordered_numbers);
  order_key_numbers(block, unit.kv_heads, block.biases, places, state.ordered_numbers + biases);
  const auto visit = [&](int step, int head, const ByteRows<Later>& key_rows, Later later) FA_INLINE_IF_FAST {
    const float* scales = state.ordered_numbers + head * groups * places + step * lanes;
    for_each_row_tile(rows, [&](int tile, auto count) FA_INLINE_IF_FAST {
      const int row = head * rows + tile;
      const float* words = q.words + head * rows * code_words(source.dim) + 2 * tile;
      const CodeQueries some = {reinterpret_cast<const std::int32_t*>(words), 2 * rows, q.sums + row * groups, q.factors + row};
      code_dots<dtype, count>(key_rows, later, some, source.dim, {scales, scales + biases, places}, scale, add,
                              state.scores + step * lanes * stride + row, stride);
    });
  };
  walk<Later>(unit, BlockBytes<dtype>{source, keys, unit.kv_head}, values_of(*pass.problem, *pass.inputs), keys, visit);
}

template <bool into_l1, DType k_dtype, DType v_dtype>
inline void score_codes(const DecodePass& pass, const Unit& unit, const KeySlots& keys, DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const KeyTensor k = keys_of(problem, *pass.inputs);
  multiply_codes<KeyCodesLater<into_l1, k_dtype>, k_dtype>(pass, unit, k, keys, {state.q, state.q_sums, state.q_factors}, false,
                                                           state);
  if (!problem.has_qv) return;
  const KeyTensor v = values_of(problem, *pass.inputs);
  multiply_codes<KeyCodesLater<into_l1, v_dtype>, v_dtype>(pass, unit, v, keys, {state.qv, state.qv_sums, state.qv_factors},
                                                           true, state);
}

template <class Later, DType dtype>
inline void add_code_values_of_block(const DecodePass& pass, const Unit& unit, const KeySlots& keys, const KeySlots& next,
                                     DecodeState& state) {
  const KeyTensor k = keys_of(*pass.problem, *pass.inputs);
  const KeyTensor v = values_of(*pass.problem, *pass.inputs);
  const DecodeSizes& sizes = state.sizes;
  const int rows = unit.rows_of_head();
  const int groups = groups_of(v);
  const int steps = Later::steps(keys.count);
  const std::int64_t numbers_of_group = std::int64_t{keys.count} * unit.kv_heads + lanes;
  float* scales = state.ordered_numbers;
  float* biases = scales + groups * numbers_of_group;
  const BlockRows<dtype> block(pass, unit, v, keys, state.numbers);
  order_value_numbers(block, unit.kv_heads, block.scales, numbers_of_group, scales);
  order_value_numbers(block, unit.kv_heads, block.biases, numbers_of_group, biases);
  const auto weights_of = [&](int group) {
    const std::int64_t words = max_words_of_weights * sizes.score_stride;
    auto* high = reinterpret_cast<std::int32_t*>(state.words) + 2 * group * words;
    return CodeWeights{high, high + words, sizes.score_stride, state.row_units + group * sizes.score_stride,
                       state.row_biases + group * sizes.score_stride};
  };
  for (int group = 0; group < groups; ++group) {
    quantize_code_weights(unit, keys.count, scales + group * numbers_of_group, biases + group * numbers_of_group,
                          middle_code<dtype>, state.scores, sizes.score_stride, weights_of(group));
  }
  const auto visit = [&](int step, int head, const ByteRows<Later>& values, Later later) FA_INLINE_IF_FAST {
    const int words = (min_of(Later::rows, keys.count - step * Later::rows) + 3) / 4;
    for (int group = 0; group < groups; ++group) {
      const CodeWeights weights = weights_of(group).from_key(step * Later::rows);
      const BlockSums sums = {state.sums, state.o, sizes.o_stride, state.alpha, weights.units, step == 0, step == steps - 1};
      const bool begins_line = group * group_bytes<dtype> % cache_line == 0;
      for_each_row_tile<value_code_rows>(rows, [&](int tile, auto count) FA_INLINE_IF_FAST {
        add_code_values<dtype, count>(values, later, tile == 0 && begins_line, weights, words, head * rows + tile, group, sums);
      });
    }
  };
  walk<Later>(unit, BlockBytes<dtype>{v, keys, unit.kv_head}, k, next, visit);
}

template <bool into_l1, DType k_dtype, DType v_dtype>
constexpr DecodeProducts code_products = {
    .keys_of_block = KeyCodesLater<into_l1, k_dtype>::keys_of_block,
    .read_queries = read_code_queries<k_dtype, v_dtype>,
    .score_block = score_codes<into_l1, k_dtype, v_dtype>,
    .value_block = add_code_values_of_block<ValueCodesLater<into_l1, v_dtype>, v_dtype>,
    .order_dims = CodeOperand::order_dims<v_dtype>,
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
