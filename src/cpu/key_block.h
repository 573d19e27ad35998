// A block of keys as backward reads it, and what it gathers there: dK and dV stay in one thread's cache.
#pragma once

#include "cpu/row_block.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Keys of the block, counted from its first, that cover what is seen of it in whole tiles; empty when nothing is.
inline KeyRange tiles_seen(KeyRange seen, KeyBlock keys) {
  if (seen.begin >= seen.end) return {0, 0};
  return {max_of(seen.begin - keys.begin, 0) / tile_keys * tile_keys,
          min_of(round_up(seen.end - keys.begin, tile_keys), keys.size)};
}

struct KeyBlockBuffers {
  float* k_rows;    // [key_block][head_dim]
  float* v_rows;    // [key_block][head_dim_v]
  float* k_panels;  // [dim panels][key_block][dim_panel], non-finite values as 0
  float* dk;        // [dim panels][key_block][dim_panel]
  float* dv;
  float* scores;      // [key_block][row_block]  S, P
  float* gradients;   // [key_block][row_block]  dP, dS
  float* derivative;  // [key_block][row_block]  softcap's; then dS in words of keys
  float* mask_rows;   // [lanes][key_block]; a vector read past its end lands in k_rows

  static std::int64_t size(const AttentionProblem& problem, std::int32_t key_block) {
    const std::int64_t k_padded = round_up(problem.head_dim, dim_panel);
    const std::int64_t v_padded = round_up(problem.head_dim_v, dim_panel);
    return key_block * (problem.head_dim + problem.head_dim_v + 2 * k_padded + v_padded + 3 * row_block + lanes);
  }

  KeyBlockBuffers(const AttentionProblem& problem, std::int32_t key_block, float* memory) {
    const auto take = [&](std::int64_t per_key) { return (memory += key_block * per_key) - key_block * per_key; };
    scores = take(row_block);
    gradients = take(row_block);
    derivative = take(row_block);
    k_panels = take(round_up(problem.head_dim, dim_panel));
    dk = take(round_up(problem.head_dim, dim_panel));
    dv = take(round_up(problem.head_dim_v, dim_panel));
    mask_rows = take(lanes);
    k_rows = take(problem.head_dim);
    v_rows = take(problem.head_dim_v);
  }
};

inline std::int64_t backward_scratch_size(const BackwardPass& pass) {
  return KeyBlockBuffers::size(*pass.problem, pass.key_block);
}

template <class Operand>
inline void pack_key_rows(const AttentionProblem& problem, const KeyReader& reader, KeyBlock keys,
                          const KeyBlockBuffers& buffers) {
  pack_rows<Operand>(keys, problem.head_dim, buffers.k_rows, [&](int key, float* row) { return reader.view_key(key, row); });
  pack_rows<Operand>(keys, problem.head_dim_v, buffers.v_rows,
                     [&](int key, float* row) { return reader.view_value(key, row); });
}

template <class Operand>
inline void pack_key_block(const BackwardPass& pass, const Unit& unit, KeyBlock keys, const KeyBlockBuffers& buffers) {
  const AttentionProblem& problem = *pass.problem;
  const KeyReader reader(problem, *pass.inputs, unit);
  pack_key_rows<Operand>(problem, reader, keys, buffers);
  // For dQ only: a row that sees a NaN in K has NaN in dS; a row that does not must not meet it as 0 * NaN.
  pack_panels<Operand>(
      keys, problem.head_dim, buffers.k_panels, [&](int key, float* row) { return reader.view_key(key, row); },
      [](Vec k) { return select(is_finite(k), k, Vec{}); });
}

inline void write_key_gradients(const Tensor& tensor, const Unit& unit, KeyBlock keys, int dim, float scale,
                                const float* panels) {
  if (!tensor.data) return;
  float row[padded_head_dim];
  for (int i = 0; i < min_of(keys.size, unit.sequence.k.length - keys.begin); ++i) {
    for (int p = 0; p < panels_of(dim); ++p) {
      const float* source = panels + (std::int64_t{p} * keys.size + i) * dim_panel;
      for (int n = 0; n < dim_vectors; ++n) store(row + p * dim_panel + n * lanes, load(source + n * lanes) * scale);
    }
    const std::int64_t slot = unit.sequence.k.begin + std::int64_t{keys.begin} + i;
    const std::int64_t offset =
        unit.batch * tensor.strides.batch + slot * tensor.strides.seq + unit.kv_head * tensor.strides.head;
    write_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, dim, row);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
