// Packing: the caller's strided rows of any dtype to the float32 layouts that the products read.
//
//   rows        [row][dim]                   elements are broadcast
//   transposed  [dim][rows of the panel]     read along the lanes, rows in lanes
//   panels      [dim panel][row][dim_panel]  read along the lanes, head dims in lanes; dims padded with 0
#pragma once

#include "cpu/row_panel.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int panels_of(int dim) { return round_up(dim, dim_panel) / dim_panel; }

// [dim][width] = the panel's rows of `tensor` times `scale`, transposed.
inline void pack_transposed(const RowPanel& panel, const Unit& unit, const ConstTensor& tensor, int dim, float scale,
                            float* packed) {
  constexpr std::int64_t stride = max_head_dim;
  float rows[lanes * stride];
  for (int v = 0; v < panel.vectors; ++v) {
    for (int lane = 0; lane < lanes; ++lane) {
      const std::int64_t offset = panel.offset(unit, tensor.strides, v * lanes + lane);
      read_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, dim, rows + lane * stride);
    }
    visit_columns(rows, stride, dim, [&](int d, Vec column) { store(packed + d * panel.width() + v * lanes, column * scale); });
  }
}

// One row of panels from `dim` contiguous floats.
inline void scatter_to_panels(const float* row, int dim, float* panels, std::int64_t panel_stride) {
  for (int d = 0; d < dim; d += dim_panel, panels += panel_stride) {
    if (d + dim_panel <= dim) {
      for (int n = 0; n < dim_vectors; ++n) store(panels + n * lanes, load(row + d + n * lanes));
    } else {
      for (int i = 0; i < dim_panel; ++i) panels[i] = d + i < dim ? row[d + i] : 0.0f;
    }
  }
}

// Keys of a unit's sequence, from position `begin` on.
struct KeyBlock {
  std::int32_t begin;
  std::int32_t size;
};

// A slot that no query of the sequence sees reads as 0, so that 0 * NaN cannot leave it.
inline void read_key(const ConstTensor& tensor, const Unit& unit, std::int32_t key, KeyRange seen, int dim, float* row) {
  if (key < seen.begin || key >= seen.end) {
    std::memset(row, 0, static_cast<std::size_t>(dim) * sizeof(float));
    return;
  }
  const std::int64_t offset = unit.batch * tensor.strides.batch +
                              (unit.sequence.k.begin + std::int64_t{key}) * tensor.strides.seq +
                              unit.kv_head * tensor.strides.head;
  read_row(tensor.dtype, element(tensor.data, tensor.dtype, offset), tensor.strides.dim, dim, row);
}

inline KeyRange keys_seen(const Unit& unit) { return visible_keys_of_rows(unit.rule, 0, unit.rule.seqlen_q); }

inline void pack_rows(const ConstTensor& tensor, const Unit& unit, KeyBlock keys, int dim, float* packed) {
  const KeyRange seen = keys_seen(unit);
  for (int i = 0; i < keys.size; ++i) read_key(tensor, unit, keys.begin + i, seen, dim, packed + std::int64_t{i} * dim);
}

inline void pack_panels(const ConstTensor& tensor, const Unit& unit, KeyBlock keys, int dim, float* packed) {
  const KeyRange seen = keys_seen(unit);
  float row[max_head_dim];
  for (int i = 0; i < keys.size; ++i) {
    read_key(tensor, unit, keys.begin + i, seen, dim, row);
    scatter_to_panels(row, dim, packed + std::int64_t{i} * dim_panel, std::int64_t{keys.size} * dim_panel);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
