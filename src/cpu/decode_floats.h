// The products of decode in float32.
#pragma once

#include "cpu/decode_state.h"
#include "cpu/key_walk.h"
#include "cpu/row_dots.h"
#include "cpu/row_values.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

template <class Later, class ValuesLater, DType k_dtype, DType v_dtype = k_dtype>
struct FloatProducts {
  static constexpr int keys_of_block = Later::keys_of_block;

  static void read_queries(const DecodePass& pass, const Unit& unit, const RowPanel& panel, int row, DecodeState& state) {
    const AttentionProblem& problem = *pass.problem;
    const AttentionInputs& inputs = *pass.inputs;
    read_rows<k_dtype>(inputs.q, panel, unit, problem.head_dim, state.sizes.q_stride, state.q + row * state.sizes.q_stride);
    if (!problem.has_qv) return;
    read_rows<v_dtype>(inputs.qv, panel, unit, problem.head_dim_v, state.sizes.qv_stride,
                       state.qv + row * state.sizes.qv_stride);
  }

  static void score_block(const DecodePass& pass, const Unit& unit, const KeySlots& keys, DecodeState& state) {
    const AttentionProblem& problem = *pass.problem;
    const float scale = ScoreScale(problem).query;
    const KeyTensor k = keys_of(problem, *pass.inputs);
    const KeyTensor v = values_of(problem, *pass.inputs);
    const std::int64_t stride = state.sizes.score_stride;
    const int rows = unit.rows_of_head();
    const int steps = Later::steps(keys.count);
    // Inlined whatever the compiler thinks of it: out of line it takes a tenth longer.
    const auto multiply = [&]<DType dtype>(const KeyTensor& source, const float* q, std::int64_t q_stride, bool add) {
      const auto visit = [&](int step, int head, const KeyRows<dtype, Later>& key_rows, Later later) FA_INLINE_IF_FAST {
        for_each_row_tile(rows, [&](int tile, auto count) FA_INLINE_IF_FAST {
          const int row = head * rows + tile;
          dots<dtype, count>(key_rows.row, later, q + row * q_stride, q_stride, source.dim, scale, add,
                             state.scores + step * stride + row, steps * stride);
        });
      };
      walk<Later>(unit, BlockRows<dtype>(pass, unit, source, keys, state.numbers), v, keys, visit);
    };
    multiply.template operator()<k_dtype>(k, state.q, state.sizes.q_stride, false);
    if (problem.has_qv) multiply.template operator()<v_dtype>(v, state.qv, state.sizes.qv_stride, true);
  }

  // `next`: the block whose keys are read after these values.
  static void value_block(const DecodePass& pass, const Unit& unit, const KeySlots& keys, const KeySlots& next,
                          DecodeState& state) {
    const KeyTensor k = keys_of(*pass.problem, *pass.inputs);
    const KeyTensor v = values_of(*pass.problem, *pass.inputs);
    const std::int64_t stride = state.sizes.score_stride;
    const int rows = unit.rows_of_head();
    if constexpr (multiplies_pairs<v_dtype>) pair_weights<ValuesLater>(state.scores, stride, keys.count, state.words);
    StepWeights<float, ValuesLater> weights;
    const auto visit = [&](int step, int head, const KeyRows<v_dtype, ValuesLater>& values,
                           ValuesLater later) FA_INLINE_IF_FAST {
      weights.find(state.scores, stride, keys.count, step);
      for_each_row_tile(rows, [&](int tile, auto count) FA_INLINE_IF_FAST {
        const int row = head * rows + tile;
        const float* rescale = step == 0 ? state.alpha + row : nullptr;
        float* o = state.o + row * state.sizes.o_stride;
        add_values<v_dtype, count>(
            values.row, later,
            OutputRows<ValuesLater>{o, state.sizes.o_stride, rescale, weights, row, state.words - state.scores}, v.dim);
      });
    };
    walk<ValuesLater>(unit, BlockRows<v_dtype>(pass, unit, v, keys, state.numbers), k, next, visit);
  }

  static void order_dims(float* o, int dim) { unpair_dims<v_dtype>(o, dim); }

 private:
  // In the order in which keys of `key_dtype` are read.
  template <DType key_dtype>
  static void read_rows(const ConstTensor& tensor, const RowPanel& panel, const Unit& unit, int dim, std::int64_t stride,
                        float* rows) {
    for (int lane = 0; lane < panel.rows; ++lane, rows += stride) {
      const std::int64_t offset = panel.offset(unit, tensor.strides, lane);
      read_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, dim, rows);
      pair_dims<key_dtype>(rows, dim);
      std::memset(rows + dim, 0, static_cast<std::size_t>(stride - dim) * sizeof(float));
    }
  }
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
