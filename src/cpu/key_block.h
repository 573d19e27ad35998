// A block of keys as backward reads it, and what it gathers there: dK and dV stay in one thread's cache.
#pragma once

#include "cpu/row_block.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Keys are taken in whole tiles of every product.
template <class Operand>
constexpr std::int32_t key_granule = is_matrix_operand<Operand> ? depth_granule<Operand> : tile_keys;

// Keys a block: K and V, their panels and gradients fill most of the L2. A function of the shape alone: it fixes the order of
// every sum.
template <class Operand>
inline std::int32_t key_block_size(const AttentionProblem& problem) {
  if (is_matrix_operand<Operand>) return Operand::terms == 1 ? 256 : 128;  // a chip with matrix tiles has 2 MiB
  constexpr std::int32_t cache_floats = 96 * 1024;                         // of 512 KiB
  constexpr std::int32_t granule = 24;
  const std::int32_t fits = cache_floats / (3 * problem.head_dim + 2 * problem.head_dim_v);
  return clamp_to(fits / granule * granule, granule, 192);
}

// Of a unit. The last one has only as many keys as are left: short sequences have no other.
template <class Operand>
inline KeyBlock key_block_of(const BackwardPass& pass, const Unit& unit, std::int32_t index) {
  const std::int32_t begin = index * pass.blocks.keys;
  const std::int32_t left = round_up(unit.sequence.k.length - begin, key_granule<Operand>);
  return {begin, min_of(left, pass.blocks.keys)};
}

// Keys of the block, counted from its first, that cover what is seen of it in whole tiles; empty when nothing is.
template <class Operand>
inline KeyRange tiles_seen(KeyRange seen, KeyBlock keys) {
  constexpr std::int32_t tile = key_granule<Operand>;
  if (seen.begin >= seen.end) return {0, 0};
  return {max_of(seen.begin - keys.begin, 0) / tile * tile, min_of(round_up(seen.end - keys.begin, tile), keys.size)};
}

template <class Operand>
struct KeyBlockBuffers {
  float* k_rows;  // [key_block][dim words]
  float* v_rows;  // [key_block][dim_v words]
  float* dk;      // [dim panels][key_block][dim_panel]
  float* dv;
  float* mask_rows;  // [lanes][key_block]; a vector read past its end lands in k_rows

  static std::int64_t size(const AttentionProblem& problem, std::int32_t key_block) {
    const std::int64_t panels = panels_of(problem.head_dim) + panels_of(problem.head_dim_v);
    return key_block *
           (row_words<Operand>(problem.head_dim) + row_words<Operand>(problem.head_dim_v) + panels * dim_panel + lanes);
  }

  KeyBlockBuffers(const AttentionProblem& problem, std::int32_t key_block, float* memory) {
    const auto take = [&](std::int64_t per_key) { return (memory += key_block * per_key) - key_block * per_key; };
    dk = take(round_up(problem.head_dim, dim_panel));
    dv = take(round_up(problem.head_dim_v, dim_panel));
    mask_rows = take(lanes);
    k_rows = take(row_words<Operand>(problem.head_dim));
    v_rows = take(row_words<Operand>(problem.head_dim_v));
  }
};

template <class Operand>
inline void pack_key_rows(const BackwardPass& pass, const KeyReader& reader, const Unit& unit, KeyBlock keys,
                          const KeyBlockBuffers<Operand>& buffers) {
  float buffer[padded_row];
  const auto pack = [&](const KeyTensor& source, float* packed) {
    const int size = row_words<Operand>(source.dim);
    for (int i = 0; i < keys.size; ++i, packed += size) {
      reader.fetch_ahead(source, keys.begin + i);
      const float* row = view_words<Operand>(reader, source, unit, keys.begin + i, buffer);
      std::memcpy(packed, row, sizeof(float) * static_cast<std::size_t>(size));
    }
  };
  pack(keys_of(*pass.problem, *pass.inputs), buffers.k_rows);
  pack(values_of(*pass.problem, *pass.inputs), buffers.v_rows);
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
    write_result_row(tensor, offset, dim, row);
  }
  streams_end();
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
