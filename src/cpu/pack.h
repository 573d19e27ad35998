// Packing: the caller's strided rows of any dtype to the layouts that the products read.
//
//   rows        [row][dim words]                  words are broadcast
//   transposed  [dim words][rows of the panel]    read along the lanes, rows in lanes
//   panels      [dim panel][row words][dim_panel] read along the lanes, head dims in lanes; dims padded with 0
#pragma once

#include "cpu/key_row.h"
#include "cpu/operand.h"
#include "cpu/result_row.h"
#include "cpu/row_panel.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int panels_of(int dim) { return round_up(dim, dim_panel) / dim_panel; }

// visit(panels [begin, end), how many of their vectors hold dims, as a constant) for the panels of a head dim: of the last one
// perhaps only the first.
template <class Visit>
FA_INLINE void for_each_width_of_panels(int dim, Visit visit) {
  static_assert(dim_vectors == 2);
  const int vectors = round_up(dim, lanes) / lanes;
  visit(0, vectors / 2, Constant<2>{});
  if (vectors % 2 == 1) visit(vectors / 2, vectors / 2 + 1, Constant<1>{});
}

// Room for a row of any head dim and the zeros that fill its last panel.
constexpr int padded_head_dim = max_head_dim + dim_panel;
constexpr int padded_row = row_floats(padded_head_dim);  // the same as words

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

// Asks for a row. Inlined wherever it is used: GCC takes a function that only prefetches to be one without effect, and drops
// the call.
FA_INLINE void fetch_row(const char* row, std::int64_t bytes) {
  for (std::int64_t byte = 0; byte < bytes; byte += cache_line) __builtin_prefetch(row + byte);
}

// Rows of a head lie far apart: all are asked for before the first is read.
FA_INLINE void fetch_rows(const ConstTensor& tensor, const Unit& unit, const RowPanel& panel, int dim) {
  const std::int64_t bytes = dim * size_of(tensor.dtype);
  for (int lane = 0; lane < panel.rows; ++lane) {
    fetch_row(element(tensor.data, tensor.dtype, panel.offset(unit, tensor.strides, lane)), bytes);
  }
}

// The whole row that meets a key's: q, then qv where a call has it.
inline const float* view_query(const AttentionInputs& inputs, const AttentionProblem& problem, const Unit& unit,
                               const RowPanel& panel, int lane, float* buffer) {
  const float* q = view_row(inputs.q, panel.offset(unit, inputs.q.strides, lane), problem.head_dim, buffer);
  if (!problem.has_qv) return q;
  if (q != buffer) std::memcpy(buffer, q, static_cast<std::size_t>(problem.head_dim) * sizeof(float));
  const std::int64_t offset = panel.offset(unit, inputs.qv.strides, lane);
  float* qv = buffer + problem.head_dim;
  read_row(inputs.qv.dtype, element(inputs.qv.data, inputs.qv.dtype, offset), inputs.qv.strides.dim, problem.head_dim_v, qv);
  std::memset(qv + problem.head_dim_v, 0, dim_panel * sizeof(float));
  return buffer;
}

// [words][width] = the panel's rows, transposed. view(lane, buffer) gives a row of words.
template <class View>
inline void pack_transposed(const RowPanel& panel, int words, float* packed, View view) {
  float buffers[lanes][padded_row];
  const float* rows[lanes];
  for (int v = 0; v < panel.vectors; ++v) {
    for (int lane = 0; lane < lanes; ++lane) rows[lane] = view(v * lanes + lane, buffers[lane]);
    visit_columns(rows, words, [&](int d, Vec column) { store(packed + d * panel.width() + v * lanes, column); });
  }
}

// The keys of a unit of one kv head, as a packed block reads them. A slot that no query of the sequence sees, or whose page
// does not exist, reads as 0, so that 0 * NaN cannot leave it.
class KeyReader {
 public:
  KeyReader(const AttentionProblem& problem, const AttentionInputs& inputs, const Unit& unit)
      : problem_(problem), inputs_(inputs), unit_(unit), seen_(visible_keys_of_unit(unit)) {}

  // In float32, zeros up to a whole panel: the row itself where it is that already, else in `buffer`.
  const float* view_key(std::int32_t key, float* buffer) const { return view(keys_of(problem_, inputs_), key, buffer); }
  const float* view_value(std::int32_t key, float* buffer) const { return view(values_of(problem_, inputs_), key, buffer); }
  // The row as it lies, when it already is what pack_row<Operand> would make of it but for the zeros at its end.
  template <class Operand>
  const char* words_of_key(std::int32_t key) const {
    const bool has_words = Operand::per_word == 2 && Operand::terms == 1 && inputs_.k.dtype == DType::bfloat16 &&
                           inputs_.k.strides.dim == 1 && problem_.head_dim % 2 == 0 && !problem_.has_qv;
    const KeySlot slot = has_words ? slot_of(key) : KeySlot{-1, 0};
    return slot.exists() ? first_element(keys_of(problem_, inputs_), slot, unit_.kv_head) : nullptr;
  }
  // All that a query is multiplied with: k, then v where a call has qv.
  const float* view_scored(std::int32_t key, float* buffer) const {
    const float* k = view_key(key, buffer);
    if (!problem_.has_qv) return k;
    float value[padded_head_dim];
    const float* v = view_value(key, value);
    if (k != buffer) std::memcpy(buffer, k, static_cast<std::size_t>(problem_.head_dim) * sizeof(float));
    std::memcpy(buffer + problem_.head_dim, v, static_cast<std::size_t>(problem_.head_dim_v) * sizeof(float));
    std::memset(buffer + problem_.scored_dims(), 0, dim_panel * sizeof(float));
    return buffer;
  }

  // For a loop that packs keys in order: a head's rows lie far apart, and one at a time each would be waited for. A quantized
  // row takes longer to read than to arrive.
  FA_INLINE void fetch_ahead(const KeyTensor& source, std::int32_t key) const {
    const KeySlot slot = source.quantization->scales ? KeySlot{-1, 0} : slot_of(key + keys_ahead);
    if (slot.exists()) fetch_row(first_element(source, slot, unit_.kv_head), source.dim * size_of(source.tensor->dtype));
  }
  FA_INLINE void fetch_scored_ahead(std::int32_t key) const {
    fetch_ahead(keys_of(problem_, inputs_), key);
    if (problem_.has_qv) fetch_ahead(values_of(problem_, inputs_), key);
  }

  KeySlot slot_of(std::int32_t key) const {
    const bool seen = seen_.begin <= key && key < seen_.end;
    return seen ? slot_of_key(problem_, inputs_, unit_.sequence, unit_.batch, key) : KeySlot{-1, 0};
  }

  const float* view(const KeyTensor& source, std::int32_t key, float* buffer) const {
    const auto zero_from = [&](int dim) {
      std::memset(buffer + dim, 0, static_cast<std::size_t>(round_up(source.dim, dim_panel) - dim) * sizeof(float));
    };
    const KeySlot slot = slot_of(key);
    if (!slot.exists()) {
      zero_from(0);
      return buffer;
    }
    const ConstTensor& tensor = *source.tensor;
    if (!source.quantization->scales) {
      return view_row(tensor, slot.offset(tensor.strides, unit_.kv_head), source.dim, buffer);
    }
    zero_from(source.dim);
    switch (tensor.dtype) {
      case DType::int8:
        dequantize_row<DType::int8>(source, slot, unit_.kv_head, buffer);
        break;
      case DType::affine8:
        dequantize_row<DType::affine8>(source, slot, unit_.kv_head, buffer);
        break;
      default:
        dequantize_row<DType::affine4>(source, slot, unit_.kv_head, buffer);
        break;
    }
    return buffer;
  }

 private:
  static constexpr int keys_ahead = 4;

  const AttentionProblem& problem_;
  const AttentionInputs& inputs_;
  const Unit& unit_;
  KeyRange seen_;
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
