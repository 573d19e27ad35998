// Packing: the caller's strided rows of any dtype to the layouts that the products read.
//
//   rows        [row][dim words]                  words are broadcast
//   transposed  [dim words][rows of the panel]    read along the lanes, rows in lanes
//   panels      [dim panel][row words][dim_panel] read along the lanes, head dims in lanes; dims padded with 0
#pragma once

#include "cpu/operand.h"
#include "cpu/row_panel.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int panels_of(int dim) { return round_up(dim, dim_panel) / dim_panel; }

// Room for a row of any head dim and the zeros that fill its last panel.
constexpr int padded_head_dim = max_head_dim + dim_panel;

// One row of words of panels, from rows that have zeros up to a whole panel.
template <class Operand, class Change>
inline void scatter_to_panels(const float* const (&rows)[Operand::per_word], int dim, float* panels, std::int64_t panel_stride,
                              Change change) {
  for (int d = 0; d < dim; d += dim_panel, panels += panel_stride) {
    for (int n = 0; n < dim_vectors; ++n) {
      Vec neighbours[Operand::per_word];
      for (int i = 0; i < Operand::per_word; ++i) neighbours[i] = change(load(rows[i] + d + n * lanes));
      store(panels + n * lanes, Operand::word(neighbours));
    }
  }
}

constexpr auto unchanged = [](Vec x) { return x; };

// Keys of a unit's sequence, from position `begin` on.
struct KeyBlock {
  std::int32_t begin;
  std::int32_t size;
};

// One row of a strided tensor in float32, zeros up to a whole panel: the row itself where it is that already, else in `buffer`.
inline const float* view_row(const ConstTensor& tensor, std::int64_t offset, int dim, float* buffer) {
  const char* row = element(tensor.data, tensor.dtype, offset);
  if (tensor.dtype == DType::float32 && tensor.strides.dim == 1 && dim % dim_panel == 0) {
    return reinterpret_cast<const float*>(row);
  }
  std::memset(buffer + dim, 0, static_cast<std::size_t>(round_up(dim, dim_panel) - dim) * sizeof(float));
  read_row(tensor.dtype, row, tensor.strides.dim, dim, buffer);
  return buffer;
}

// [dim words][width] = the panel's rows of `tensor`, transposed.
template <class Operand>
inline void pack_transposed(const RowPanel& panel, const Unit& unit, const ConstTensor& tensor, int dim, float* packed) {
  float buffers[lanes][padded_head_dim];
  const float* rows[lanes];
  for (int v = 0; v < panel.vectors; ++v) {
    for (int lane = 0; lane < lanes; ++lane) {
      rows[lane] = view_row(tensor, panel.offset(unit, tensor.strides, v * lanes + lane), dim, buffers[lane]);
      if constexpr (Operand::per_word > 1) {
        pack_row<Operand>(rows[lane], dim, buffers[lane]);
        rows[lane] = buffers[lane];
      }
    }
    visit_columns(rows, words<Operand>(dim), [&](int d, Vec column) { store(packed + d * panel.width() + v * lanes, column); });
  }
}

// A slot that no query of the sequence sees reads as 0, so that 0 * NaN cannot leave it.
inline const float* view_key(const ConstTensor& tensor, const Unit& unit, std::int32_t key, KeyRange seen, int dim,
                             float* buffer) {
  if (key < seen.begin || key >= seen.end) {
    std::memset(buffer, 0, static_cast<std::size_t>(round_up(dim, dim_panel)) * sizeof(float));
    return buffer;
  }
  const std::int64_t offset = unit.batch * tensor.strides.batch +
                              (unit.sequence.k.begin + std::int64_t{key}) * tensor.strides.seq +
                              unit.kv_head * tensor.strides.head;
  return view_row(tensor, offset, dim, buffer);
}

inline KeyRange keys_seen(const Unit& unit) { return visible_keys_of_rows(unit.rule, 0, unit.rule.seqlen_q); }

// [keys][dim words].
template <class Operand>
inline void pack_rows(const ConstTensor& tensor, const Unit& unit, KeyBlock keys, int dim, float* packed) {
  const KeyRange seen = keys_seen(unit);
  float row[padded_head_dim];
  for (int i = 0; i < keys.size; ++i) {
    pack_row<Operand>(view_key(tensor, unit, keys.begin + i, seen, dim, row), dim,
                      packed + std::int64_t{i} * words<Operand>(dim));
  }
}

// [dim panels][key words][dim_panel], each value through `change` first.
template <class Operand, class Change>
inline void pack_panels(const ConstTensor& tensor, const Unit& unit, KeyBlock keys, int dim, float* packed, Change change) {
  const KeyRange seen = keys_seen(unit);
  float buffers[Operand::per_word][padded_head_dim];
  for (int i = 0; i < keys.size; i += Operand::per_word) {
    const float* rows[Operand::per_word];
    for (int n = 0; n < Operand::per_word; ++n) rows[n] = view_key(tensor, unit, keys.begin + i + n, seen, dim, buffers[n]);
    scatter_to_panels<Operand>(rows, dim, packed + std::int64_t{i / Operand::per_word} * dim_panel,
                               std::int64_t{words<Operand>(keys.size)} * dim_panel, change);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
