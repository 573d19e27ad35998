// New keys and values into the cache, and rotary embedding of new keys and queries: row by row, in float32, rounded once.
#pragma once

#include "cpu/kernels.h"
#include "cpu/key_slot.h"
#include "cpu/quantize_row.h"
#include "semantics/rotary.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// row[dim], rounded to the dtype of q and k as it would be in memory.
inline void rotate_row(const AttentionProblem& problem, const RotaryTable& table, std::int32_t position, float* row) {
  const int pairs = problem.rotary_dim / 2;
  float cosines[max_head_dim_of_tensor / 2];
  float sines[max_head_dim_of_tensor / 2];
  const std::int64_t angle_row = clamp_to(position, 0, problem.rotary_rows - 1);
  read_row(table.dtype, element(table.cos, table.dtype, angle_row * table.cos_stride), 1, pairs, cosines);
  read_row(table.dtype, element(table.sin, table.dtype, angle_row * table.sin_stride), 1, pairs, sines);
  const int step = problem.rotary_interleaved ? 2 : 1;
  const int partner = problem.rotary_interleaved ? 1 : pairs;
  for (int i = 0; i < pairs; ++i) {
    float& first = row[i * step];
    float& second = row[i * step + partner];
    const RotaryPair<float> rotated = rotate(RotaryPair<float>{first, second}, cosines[i], sines[i]);
    first = rotated.first;
    second = rotated.second;
  }
  float rounded[max_head_dim_of_tensor];
  write_row(problem.dtype, rounded, 1, problem.rotary_dim, row);
  read_row(problem.dtype, rounded, 1, problem.rotary_dim, row);
}

inline void write_cache_row(const Tensor& tensor, const Quantization& quantization, KeySlot slot, std::int32_t head, int dim,
                            const float* row) {
  char* destination = element(tensor.data, tensor.dtype, slot.offset(tensor.strides, head));
  const auto write_groups = [&](void* data, const Strides& strides, int groups, const float* values) {
    write_row(quantization.dtype, element(data, quantization.dtype, slot.offset(strides, head)), strides.dim, groups, values);
  };
  switch (tensor.dtype) {
    case DType::int8: {
      const float scale = quantize_int8(row, dim, destination);
      write_groups(quantization.scales, quantization.scale_strides, 1, &scale);
      return;
    }
    case DType::affine8:
    case DType::affine4: {
      constexpr int max_groups = round_up(max_head_dim_of_tensor / quantization_group, lanes);  // write_row takes whole vectors
      float scales[max_groups];
      float biases[max_groups];
      quantize_affine(row, dim, tensor.dtype == DType::affine8 ? 8 : 4, destination, scales, biases);
      write_groups(quantization.scales, quantization.scale_strides, dim / quantization_group, scales);
      write_groups(quantization.biases, quantization.bias_strides, dim / quantization_group, biases);
      return;
    }
    default:
      write_row(tensor.dtype, destination, tensor.strides.dim, dim, row);
  }
}

inline void append_rows(const AppendPass& pass, const AppendTask& task) {
  const AttentionProblem& problem = *pass.problem;
  const WritableCache& cache = *pass.cache;
  const ConstTensor& source = task.values ? pass.new_keys->v : pass.new_keys->k;
  const Tensor& tensor = task.values ? cache.v : cache.k;
  const Quantization& quantization = task.values ? cache.v_quantization : cache.k_quantization;
  const int dim = task.values ? problem.head_dim_v : problem.head_dim;
  const bool rotated = !task.values && pass.rotary->cos;
  float row[max_head_dim_of_tensor];
  for (std::int32_t i = 0; i < pass.sequence_count; ++i) {
    const NewRows& sequence = pass.sequences[i];
    for (std::int32_t token = 0; token < sequence.rows.length; ++token) {
      const KeySlot slot = cache_slot(problem, pass.inputs->cache, sequence.cache_row, sequence.first_slot + token);
      if (!slot.exists()) continue;
      const std::int64_t offset = sequence.batch * source.strides.batch +
                                  (std::int64_t{sequence.rows.begin} + token) * source.strides.seq +
                                  task.kv_head * source.strides.head;
      read_row(source.dtype, element(source.data, source.dtype, offset), source.strides.dim, dim, row);
      if (rotated) rotate_row(problem, *pass.rotary, rotary_position_of_key(sequence.rotary_base, token), row);
      write_cache_row(tensor, quantization, slot, task.kv_head, dim, row);
    }
  }
}

inline void rotate_rows(const RotatePass& pass, const RotateTask& task) {
  const AttentionProblem& problem = *pass.problem;
  const ConstTensor& q = pass.inputs->q;
  const Tensor& rotated = *pass.rotated;
  const auto offset = [&](const Strides& strides, std::int32_t i) {
    return task.batch * strides.batch + (std::int64_t{task.rows.begin} + i) * strides.seq + task.head * strides.head;
  };
  float row[max_head_dim_of_tensor];
  for (std::int32_t i = 0; i < task.rows.length; ++i) {
    read_row(q.dtype, element(q.data, q.dtype, offset(q.strides, i)), q.strides.dim, problem.head_dim, row);
    const std::int32_t position =
        rotary_position_of_query(task.rotary_base, i, problem.causal, problem.window_left, problem.window_right);
    rotate_row(problem, *pass.rotary, position, row);
    write_row(rotated.dtype, element(rotated.data, rotated.dtype, offset(rotated.strides, i)), rotated.strides.dim,
              problem.head_dim, row);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
