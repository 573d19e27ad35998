// Forward of a few query rows over many keys (flash-decoding): K and V are read once, in the order of memory.
//
//   for each block of keys:
//     for a few keys at a time, for each kv head:  S = K Q^T of the head's rows      [keys][rows of all heads], log2 units
//     S = mask(ALiBi(softcap(S)));  online softmax over the rows of all heads       P, alpha
//     for a few keys at a time, for each kv head:  O = alpha O + P V
//   O = O / l, to the caller, or to a partial result when other tasks have the rest of the keys
#pragma once

#include "cpu/decode_codes.h"
#include "cpu/decode_floats.h"
#include "cpu/decode_integers.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

inline void start_rows(const DecodeProducts& products, const DecodePass& pass, const DecodeTask& task, DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const AttentionInputs& inputs = *pass.inputs;
  const Unit& unit = *task.unit;
  for (int i = 0; i < state.panel_count; ++i) {
    const int row = i * panel_rows;
    RowPanel& panel = state.panels[i];
    panel = RowPanel(problem, inputs, unit, row, state.sizes.rows);
    start_softmax(panel, task.is_first ? inputs.learnable_sink : nullptr, state.softmax[i]);
    products.read_queries(pass, unit, panel, row, state);
  }
}

template <int N>
inline void softmax_of_panel(const AttentionProblem& problem, const AttentionInputs& inputs, const RowPanel& panel,
                             const ScoreTile& tile, SoftmaxState& state, float* alpha) {
  for (int n = 0; n < N; ++n) store(alpha + n * lanes, splat(1.0f));
  softmax_tile<N>(tile, state, 1.0f, 0.0f,
                  [&](const float* factors) { std::memcpy(alpha, factors, N * lanes * sizeof(float)); });
  if (problem.has_dropout) drop_probabilities(problem, inputs, panel, tile);
}

inline void softmax_block(const DecodePass& pass, const Unit& unit, const KeySlots& keys, const ScoreSteps& steps,
                          DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const ScoreContext context = {
      &problem, pass.inputs, &unit, ScoreScale(problem), state.mask_rows, round_up(max_decode_block, lanes), nullptr};
  for (int i = 0; i < state.panel_count; ++i) {
    const RowPanel& panel = state.panels[i];
    const ScoreTile tile = {state.scores + i * panel_rows, state.sizes.score_stride, keys.count, keys.begin};
    float* alpha = state.alpha + i * panel_rows;
    steps.apply(context, panel, tile);
    switch (panel.vectors) {
      case 1:
        softmax_of_panel<1>(problem, *pass.inputs, panel, tile, state.softmax[i], alpha);
        break;
      case 2:
        softmax_of_panel<2>(problem, *pass.inputs, panel, tile, state.softmax[i], alpha);
        break;
      default:
        softmax_of_panel<3>(problem, *pass.inputs, panel, tile, state.softmax[i], alpha);
        break;
    }
  }
}

inline void finish_rows(const DecodeProducts& products, const DecodePass& pass, const DecodeTask& task, DecodeState& state) {
  for (int row = 0; row < state.sizes.rows; ++row) {
    products.order_dims(state.o + row * state.sizes.o_stride, pass.problem->head_dim_v);
  }
  for (int i = 0; i < state.panel_count; ++i) {
    float* o = state.o + i * panel_rows * state.sizes.o_stride;
    finish_panel(*pass.problem, *pass.outputs, *task.unit, state.panels[i], state.softmax[i], i * panel_rows, task.partial,
                 [&](const auto& visit) {
                   for (int lane = 0; lane < state.panels[i].rows; ++lane) visit(lane, o + lane * state.sizes.o_stride);
                 });
  }
}

inline void decode_rows(const DecodeProducts& products, const DecodePass& pass, const DecodeTask& task, float* scratch) {
  const Unit& unit = *task.unit;
  const ScoreSteps steps(*pass.problem, *pass.inputs);
  DecodeState state(pass, task, scratch);
  start_rows(products, pass, task, state);
  KeySlots blocks[2];
  const int block = products.keys_of_block;
  blocks[0] = KeySlots(pass, unit, task.keys.begin, min_of(block, task.keys.end - task.keys.begin));
  for (int i = 0; blocks[i].count > 0; i = 1 - i) {
    const KeySlots& keys = blocks[i];
    KeySlots& next = blocks[1 - i];
    const std::int32_t end = keys.begin + keys.count;
    next = KeySlots(pass, unit, end, min_of(block, task.keys.end - end));
    products.score_block(pass, unit, keys, state);
    softmax_block(pass, unit, keys, steps, state);
    products.value_block(pass, unit, keys, next.count > 0 ? next : keys, state);
  }
  finish_rows(products, pass, task, state);
}

// ---- the products that suit a cache

inline bool suits_small_l1(ReadAhead read_ahead) {
  return read_ahead == ReadAhead::into_l2 || read_ahead == ReadAhead::into_l2_from_memory;
}

// In cache, P V takes more keys a step, since O is read and written once a step; in memory their rows are too many places, and
// in float32 few registers gain nothing.
template <DType dtype>
inline const DecodeProducts& products_of_numbers(const DecodeTask& task) {
  constexpr bool gains = many_registers || dtype != DType::float32;
  using ValuesInCache = std::conditional_t<gains, StreamsIntoL2::FourKeys, StreamsIntoL2>;
  switch (task.read_ahead) {
    case ReadAhead::into_l2:
      return float_products<StreamsIntoL2, ValuesInCache, dtype>;
    case ReadAhead::into_l2_from_memory:
      return float_products<StreamsIntoL2, StreamsIntoL2, dtype>;
    case ReadAhead::into_l1_from_memory:
      if constexpr (FA_TWO_STREAMS && dtype == DType::float32) {
        // More rows wait for arithmetic, which passes over O less often with four.
        if (task.unit->rows_of_head() <= tile_rows) return float_products<TwoStreamsIntoL1, TwoStreamsIntoL1, dtype>;
      }
      [[fallthrough]];
    case ReadAhead::into_l1:
      return float_products<StreamsIntoL1, StreamsIntoL1, dtype>;
  }
  __builtin_unreachable();
}

// Codes take longer to turn into float32 than to arrive: from memory as from a cache.
template <DType k_dtype, DType v_dtype>
inline const DecodeProducts& products_in_floats(const DecodeTask& task) {
  if (suits_small_l1(task.read_ahead)) return float_products<StreamsIntoL2, StreamsIntoL2, k_dtype, v_dtype>;
  return float_products<StreamsIntoL1, StreamsIntoL1, k_dtype, v_dtype>;
}

inline const DecodeProducts& products_of_integers(const DecodeTask& task) {
  if (suits_small_l1(task.read_ahead)) return integer_products<StreamsIntoL2>;
  return integer_products<StreamsIntoL1>;
}

template <DType k_dtype, DType v_dtype>
inline const DecodeProducts& products_of_codes(const DecodePass& pass, const DecodeTask& task) {
  if constexpr (FA_CODE_DOT) {
    if (multiplies_codes(pass)) {
      if (suits_small_l1(task.read_ahead)) return code_products<false, k_dtype, v_dtype>;
      return code_products<true, k_dtype, v_dtype>;
    }
  }
  return products_in_floats<k_dtype, v_dtype>(task);
}

// Of the dtypes of a cache, only the two with MLX's codes may be mixed.
inline const DecodeProducts& products_of(const DecodePass& pass, const DecodeTask& task) {
  const DType v_dtype = pass.inputs->v.dtype;
  switch (pass.inputs->k.dtype) {
    case DType::float32:
      return products_of_numbers<DType::float32>(task);
    case DType::bfloat16:
      return products_of_numbers<DType::bfloat16>(task);
    case DType::float16:
      return products_of_numbers<DType::float16>(task);
    case DType::int8:
      return multiplies_integers(pass) ? products_of_integers(task) : products_in_floats<DType::int8, DType::int8>(task);
    case DType::affine8:
      return v_dtype == DType::affine4 ? products_of_codes<DType::affine8, DType::affine4>(pass, task)
                                       : products_of_codes<DType::affine8, DType::affine8>(pass, task);
    default:
      return v_dtype == DType::affine8 ? products_of_codes<DType::affine4, DType::affine8>(pass, task)
                                       : products_of_codes<DType::affine4, DType::affine4>(pass, task);
  }
}

inline void decode(const DecodePass& pass, const DecodeTask& task, float* scratch) {
  decode_rows(products_of(pass, task), pass, task, scratch);
}

// out = sum over parts of 2^(lse - max) O, over the sum of the weights. A row's parts are added in the order of their keys.
inline void combine_partials(const DecodePass& pass, const Unit& unit, const Partial* parts, std::int32_t count) {
  const AttentionProblem& problem = *pass.problem;
  const int dims = round_up(problem.head_dim_v, lanes);
  float sum_of_row[padded_head_dim];
  for (int first = 0; first < unit.packed_rows(); first += panel_rows) {
    const RowPanel panel(problem, *pass.inputs, unit, first, unit.packed_rows());
    for (int lane = 0; lane < panel.rows; ++lane) {
      const int row = first + lane;
      float maximum = lowest_score;
      for (std::int32_t i = 0; i < count; ++i) {
        maximum = parts[i].lse_log2[row] > maximum ? parts[i].lse_log2[row] : maximum;
      }
      float total = 0.0f;
      std::memset(sum_of_row, 0, static_cast<std::size_t>(dims) * sizeof(float));
      for (std::int32_t i = 0; i < count; ++i) {
        const float weight = __builtin_exp2f(parts[i].lse_log2[row] - maximum);
        if (weight == 0.0f) continue;
        total += weight;
        const float* o = parts[i].o + std::int64_t{row} * dims;
        for (int d = 0; d < dims; d += lanes) store(sum_of_row + d, load(sum_of_row + d) + load(o + d) * weight);
      }
      scale_row(sum_of_row, total == 0.0f ? 0.0f : 1.0f / total, dims);
      const float lse_log2 = total == 0.0f ? -__builtin_inff() : maximum + __builtin_log2f(total);
      write_result(problem, *pass.outputs, panel, unit, lane, sum_of_row, lse_log2);
    }
  }
  streams_end();
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
