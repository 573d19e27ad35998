// Forward of a few query rows over many keys (flash-decoding): K and V are read once, in the order of memory.
//
//   for each block of keys:
//     for a few keys at a time, for each kv head:  S = K Q^T of the head's rows      [keys][rows of all heads], log2 units
//     S = mask(ALiBi(softcap(S)));  online softmax over the rows of all heads       P, alpha
//     for a few keys at a time, for each kv head:  O = alpha O + P V
//   O = O / l, to the caller, or to a partial result when other tasks have the rest of the keys
#pragma once

#include "cpu/key_walk.h"
#include "cpu/online_softmax.h"
#include "cpu/pack.h"
#include "cpu/row_dots.h"
#include "cpu/row_values.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int max_decode_panels = (max_decode_rows + panel_rows - 1) / panel_rows;

struct DecodeSizes {
  int rows;
  std::int64_t score_stride;  // floats, as all of these
  std::int64_t q_stride;
  std::int64_t qv_stride;  // 0: no qv
  std::int64_t o_stride;
  std::int64_t numbers;  // of a block's codes

  DecodeSizes(const DecodePass& pass, int unit_rows)
      : rows(unit_rows),
        score_stride(round_up(unit_rows, lanes)),
        q_stride(round_up(pass.problem->head_dim, lanes)),
        qv_stride(pass.problem->has_qv ? round_up(pass.problem->head_dim_v, lanes) : 0),
        o_stride(round_up(pass.problem->head_dim_v, lanes)),
        numbers(0) {
    if (!is_affine(pass.inputs->k.dtype)) return;
    const int most_kv_heads = unit_rows / pass.problem->group();
    const int groups = max_of(pass.problem->head_dim, pass.problem->head_dim_v) / quantization_group;
    numbers = std::int64_t{2 * max_decode_block} * most_kv_heads * groups;
  }

  std::int64_t scores() const { return (max_decode_block + max_streams) * score_stride; }
  std::int64_t mask_rows() const { return std::int64_t{lanes} * round_up(max_decode_block, lanes); }
  std::int64_t total() const {
    return scores() + mask_rows() + rows * (q_stride + qv_stride + o_stride) + score_stride + numbers;
  }
};

inline std::int64_t decode_scratch_size(const DecodePass& pass, std::int32_t rows) { return DecodeSizes(pass, rows).total(); }

struct DecodeState {
  DecodeSizes sizes;
  int panel_count;
  RowPanel panels[max_decode_panels];
  SoftmaxState softmax[max_decode_panels];
  float* scores;
  float* mask_rows;
  float* q;
  float* qv;
  float* o;
  float* alpha;
  float* numbers;

  DecodeState(const DecodePass& pass, const DecodeTask& task, float* scratch)
      : sizes(pass, task.unit->packed_rows()), panel_count((sizes.rows + panel_rows - 1) / panel_rows) {
    const auto take = [&scratch](std::int64_t size) { return (scratch += size) - size; };
    scores = take(sizes.scores());
    mask_rows = take(sizes.mask_rows());
    q = take(sizes.rows * sizes.q_stride);
    qv = take(sizes.rows * sizes.qv_stride);
    o = take(sizes.rows * sizes.o_stride);
    alpha = take(sizes.score_stride);
    numbers = take(sizes.numbers);
    // The columns after the last row are computed with the others.
    if (sizes.rows < sizes.score_stride) std::memset(scores, 0, static_cast<std::size_t>(sizes.scores()) * sizeof(float));
    std::memset(o, 0, static_cast<std::size_t>(sizes.rows * sizes.o_stride) * sizeof(float));
  }
};

// In the order in which keys of `key_dtype` are read.
template <DType key_dtype>
inline void read_queries(const ConstTensor& tensor, const RowPanel& panel, const Unit& unit, int dim, std::int64_t stride,
                         float* rows) {
  for (int lane = 0; lane < panel.rows; ++lane, rows += stride) {
    const std::int64_t offset = panel.offset(unit, tensor.strides, lane);
    read_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, dim, rows);
    pair_dims<key_dtype>(rows, dim);
    std::memset(rows + dim, 0, static_cast<std::size_t>(stride - dim) * sizeof(float));
  }
}

template <DType k_dtype, DType v_dtype>
inline void start_rows(const DecodePass& pass, const DecodeTask& task, DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const AttentionInputs& inputs = *pass.inputs;
  const Unit& unit = *task.unit;
  for (int i = 0; i < state.panel_count; ++i) {
    const int row = i * panel_rows;
    RowPanel& panel = state.panels[i];
    panel = RowPanel(problem, inputs, unit, row, state.sizes.rows);
    start_softmax(panel, task.is_first ? inputs.learnable_sink : nullptr, state.softmax[i]);
    read_queries<k_dtype>(inputs.q, panel, unit, problem.head_dim, state.sizes.q_stride, state.q + row * state.sizes.q_stride);
    if (problem.has_qv) {
      read_queries<v_dtype>(inputs.qv, panel, unit, problem.head_dim_v, state.sizes.qv_stride,
                            state.qv + row * state.sizes.qv_stride);
    }
  }
}

template <class Later, DType k_dtype, DType v_dtype>
inline void score_block(const DecodePass& pass, const Unit& unit, const KeySlots& keys, DecodeState& state) {
  const AttentionProblem& problem = *pass.problem;
  const float scale = ScoreScale(problem).query;
  const KeyTensor k = keys_of(problem, *pass.inputs);
  const KeyTensor v = values_of(problem, *pass.inputs);
  const std::int64_t stride = state.sizes.score_stride;
  const int rows = unit.rows_of_head();
  const int steps = keys.steps(Later::streams);
  // Inlined whatever the compiler thinks of it: out of line it takes a tenth longer.
  const auto multiply = [&]<DType dtype>(const KeyTensor& source, const float* q, std::int64_t q_stride, bool add) {
    const auto visit = [&](int step, int head, const KeyRow<dtype>* key_rows, Later later) FA_INLINE_IF_FAST {
      for_each_row_tile(rows, [&](int tile, auto count) FA_INLINE_IF_FAST {
        const int row = head * rows + tile;
        dots<dtype, count>(key_rows, later, q + row * q_stride, q_stride, source.dim, scale, add,
                           state.scores + step * stride + row, steps * stride);
      });
    };
    walk<Later, dtype>(unit, BlockRows<dtype>(pass, unit, source, keys, state.numbers), v, keys, visit);
  };
  multiply.template operator()<k_dtype>(k, state.q, state.sizes.q_stride, false);
  if (problem.has_qv) multiply.template operator()<v_dtype>(v, state.qv, state.sizes.qv_stride, true);
}

template <int N>
inline void softmax_of_panel(const AttentionProblem& problem, const AttentionInputs& inputs, const RowPanel& panel,
                             const ScoreTile& tile, SoftmaxState& state, float* alpha) {
  softmax_tile<N>(tile, state, alpha);
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

// `next`: the block whose keys are read after these values.
template <class Later, DType v_dtype>
inline void value_block(const DecodePass& pass, const Unit& unit, const KeySlots& keys, const KeySlots& next,
                        DecodeState& state) {
  const KeyTensor k = keys_of(*pass.problem, *pass.inputs);
  const KeyTensor v = values_of(*pass.problem, *pass.inputs);
  const std::int64_t stride = state.sizes.score_stride;
  const int rows = unit.rows_of_head();
  const int steps = keys.steps(Later::streams);
  const auto visit = [&](int step, int head, const KeyRow<v_dtype>* value_rows, Later later) FA_INLINE_IF_FAST {
    const int keys_left = min_of(Later::streams, (keys.count - step + steps - 1) / steps);
    for_each_row_tile(rows, [&](int tile, auto count) FA_INLINE_IF_FAST {
      const int row = head * rows + tile;
      add_values<v_dtype, count>(value_rows, later, keys_left, state.scores + step * stride + row, steps * stride,
                                 step == 0 ? state.alpha + row : nullptr, v.dim, state.o + row * state.sizes.o_stride,
                                 state.sizes.o_stride);
    });
  };
  walk<Later, v_dtype>(unit, BlockRows<v_dtype>(pass, unit, v, keys, state.numbers), k, next, visit);
}

template <DType v_dtype>
inline void finish_rows(const DecodePass& pass, const DecodeTask& task, DecodeState& state) {
  for (int row = 0; row < state.sizes.rows; ++row) {
    unpair_dims<v_dtype>(state.o + row * state.sizes.o_stride, pass.problem->head_dim_v);
  }
  for (int i = 0; i < state.panel_count; ++i) {
    finish_panel(*pass.problem, *pass.outputs, *task.unit, state.panels[i], state.softmax[i], i * panel_rows,
                 state.o + i * panel_rows * state.sizes.o_stride, state.sizes.o_stride, task.partial);
  }
}

template <class Later, DType k_dtype, DType v_dtype = k_dtype>
inline void decode_rows(const DecodePass& pass, const DecodeTask& task, float* scratch) {
  const Unit& unit = *task.unit;
  const ScoreSteps steps(*pass.problem, *pass.inputs);
  DecodeState state(pass, task, scratch);
  start_rows<k_dtype, v_dtype>(pass, task, state);
  KeySlots blocks[2];
  constexpr int block = Later::keys_of_block;
  blocks[0] = KeySlots(pass, unit, task.keys.begin, min_of(block, task.keys.end - task.keys.begin));
  for (int i = 0; blocks[i].count > 0; i = 1 - i) {
    const KeySlots& keys = blocks[i];
    KeySlots& next = blocks[1 - i];
    const std::int32_t end = keys.begin + keys.count;
    next = KeySlots(pass, unit, end, min_of(block, task.keys.end - end));
    score_block<Later, k_dtype, v_dtype>(pass, unit, keys, state);
    softmax_block(pass, unit, keys, steps, state);
    value_block<Later, v_dtype>(pass, unit, keys, next.count > 0 ? next : keys, state);
  }
  finish_rows<v_dtype>(pass, task, state);
}

// An instance for each way to read ahead.
template <DType dtype>
inline void decode_numbers(const DecodePass& pass, const DecodeTask& task, float* scratch) {
  if (task.read_ahead == ReadAhead::into_l2) return decode_rows<StreamsIntoL2, dtype>(pass, task, scratch);
  if constexpr (FA_TWO_STREAMS && dtype == DType::float32) {
    // More rows wait for arithmetic, which passes over O less often with four.
    const bool waits_for_memory = task.unit->rows_of_head() <= tile_rows;
    if (task.read_ahead == ReadAhead::into_l1_from_memory && waits_for_memory) {
      return decode_rows<TwoStreamsIntoL1, dtype>(pass, task, scratch);
    }
  }
  decode_rows<StreamsIntoL1, dtype>(pass, task, scratch);
}

// MLX's codes take longer to turn into numbers than to arrive: one instance does for any cache.
template <DType k_dtype, DType v_dtype>
inline void decode_codes(const DecodePass& pass, const DecodeTask& task, float* scratch) {
  decode_rows<StreamsIntoL2, k_dtype, v_dtype>(pass, task, scratch);
}

// Of the dtypes of a cache, only the two with MLX's codes may be mixed.
inline void decode(const DecodePass& pass, const DecodeTask& task, float* scratch) {
  const DType v_dtype = pass.inputs->v.dtype;
  switch (pass.inputs->k.dtype) {
    case DType::float32:
      return decode_numbers<DType::float32>(pass, task, scratch);
    case DType::bfloat16:
      return decode_numbers<DType::bfloat16>(pass, task, scratch);
    case DType::float16:
      return decode_numbers<DType::float16>(pass, task, scratch);
    case DType::int8:
      return decode_numbers<DType::int8>(pass, task, scratch);
    case DType::affine8:
      if (v_dtype == DType::affine4) return decode_codes<DType::affine8, DType::affine4>(pass, task, scratch);
      return decode_codes<DType::affine8, DType::affine8>(pass, task, scratch);
    default:
      if (v_dtype == DType::affine8) return decode_codes<DType::affine4, DType::affine8>(pass, task, scratch);
      return decode_codes<DType::affine4, DType::affine4>(pass, task, scratch);
  }
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
