// What a thread reads after the block of keys at hand comes while it multiplies: K and V of the block after it and q of its
// next task are packed, attn_mask's rows and what cannot be copied are asked for.
#pragma once

#include "cpu/lines_ahead.h"
#include "cpu/products.h"
#include "cpu/row_copies.h"

#if !defined(FA_PACK_AHEAD)  // 1: the level's processors multiply as fast while they fetch and copy
#define FA_PACK_AHEAD 0
#endif

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// The parts of a packed block.
struct BlockParts {
  float* k;  // [key][dim words]
  float* v;  // [dim panels][key words][dim_panel]
};

template <class Operand>
class SomePackAhead {
  using Copies = RowCopies<Operand>;
  using Form = typename Copies::Form;
  using Span = typename Copies::Span;

 public:
  // Whether a block of a unit's keys can be copied; else it is only asked for.
  static bool can_copy(const AttentionProblem& problem, const AttentionInputs& inputs, const Unit& unit, KeyBlock block) {
    const KeyTensor k = keys_of(problem, inputs);
    const KeyTensor v = values_of(problem, inputs);
    const KeyRange keys = seen_keys(unit, block);
    if (keys.begin >= keys.end || problem.has_qv || !have_form(k, along_dims) || !have_form(v, as_values)) return false;
    // A page is a span of its own. None is missing, no pair divided.
    int spans = 0;
    bool are_whole = true;
    for_each_stretch(problem, inputs, unit.sequence, unit.batch, keys,
                     [&](std::int32_t first, std::int32_t count, KeySlot slot) {
                       are_whole &= slot.exists() && first % Operand::per_word == 0 && count % Operand::per_word == 0;
                       ++spans;
                     });
    return are_whole && 2 * spans <= Copies::most_spans;
  }

  // Begins with a block; finish_block() does what is left.
  void copy_block(const AttentionProblem& problem, const AttentionInputs& inputs, const Unit& unit, KeyBlock block,
                  BlockParts parts) {
    forget_block();
    const KeyRange keys = seen_keys(unit, block);
    const KeyTensor k = keys_of(problem, inputs);
    const KeyTensor v = values_of(problem, inputs);
    const std::int64_t k_row = words<Operand>(problem.head_dim);
    const std::int64_t v_panel = std::int64_t{words<Operand>(block.size)} * dim_panel;
    for_each_stretch(
        problem, inputs, unit.sequence, unit.batch, keys, [&](std::int32_t first, std::int32_t count, KeySlot slot) {
          float* to = parts.k + (first - block.begin) * k_row;
          keys_.add(span_of(*k.tensor, first_element(k, slot, unit.kv_head), count, k.dim, along_dims, to, k_row, dim_panel));
        });
    for_each_stretch(
        problem, inputs, unit.sequence, unit.batch, keys, [&](std::int32_t first, std::int32_t count, KeySlot slot) {
          float* to = parts.v + (first - block.begin) / Operand::per_word * dim_panel;
          keys_.add(span_of(*v.tensor, first_element(v, slot, unit.kv_head), count, v.dim, as_values, to, dim_panel, v_panel));
        });
    zero_others(problem, keys, block, parts);
  }
  void finish_block() {
    while (!keys_.is_done()) keys_.step();
  }

  void ask_for_block(const AttentionProblem& problem, const AttentionInputs& inputs, const Unit& unit, KeyBlock block) {
    forget_block();
    const KeyTensor k = keys_of(problem, inputs);
    const KeyTensor v = values_of(problem, inputs);
    const KeyRange keys = seen_keys(unit, block);
    // A quantized row takes longer to read than to arrive.
    if (keys.begin >= keys.end || k.quantization->scales || v.quantization->scales) return;
    for_each_stretch(problem, inputs, unit.sequence, unit.batch, keys, [&](std::int32_t, std::int32_t count, KeySlot slot) {
      if (!slot.exists()) return;
      add_lines(*v.tensor, first_element(v, slot, unit.kv_head), count, v.dim);
      add_lines(*k.tensor, first_element(k, slot, unit.kv_head), count, k.dim);
    });
    spans_below_mask_ = lines_.spans();
  }

  // Begins with rows of q, to [row][dim words]. True: finish_rows() does what is left; false: they are only asked for.
  bool add_rows(const AttentionProblem& problem, const AttentionInputs& inputs, const Unit& unit, RowRange rows, float* to) {
    const ConstTensor& q = inputs.q;
    // The heads of a group lie side by side, or there is one.
    const bool are_side_by_side = q.strides.dim == 1 && (unit.group == 1 || q.strides.head == problem.head_dim);
    if (rows.begin >= rows.end || problem.has_qv || !are_side_by_side) return false;
    const std::int32_t first = rows.begin / unit.group;
    const std::int32_t count = (rows.end - 1) / unit.group + 1 - first;
    const char* row = element(q.data, q.dtype,
                              unit.batch * q.strides.batch + (unit.sequence.q.begin + std::int64_t{first}) * q.strides.seq +
                                  unit.first_head * q.strides.head);
    const bool are_copied = have_form({&q, &inputs.cache.k, problem.head_dim}, along_dims) && rows.begin % unit.group == 0;
    if (are_copied) {
      const std::int64_t to_row = std::int64_t{unit.group} * words<Operand>(problem.head_dim);
      rows_.add(span_of(q, row, count, unit.group * problem.head_dim, along_dims, to, to_row, dim_panel));
    } else {
      add_lines(q, row, count, unit.group * problem.head_dim);
    }
    spans_of_rows_ = spans_below_mask_ = lines_.spans();
    return are_copied;
  }
  void finish_rows() {
    while (!rows_.is_done()) rows_.step();
  }

  // Heads that have masks of their own: only the first of a group.
  void add_mask(const MaskTensor& mask, const Unit& unit, const RowPanel& panel, KeyRange keys) {
    if (!mask.data || mask.key != 1) return;
    lines_.keep(spans_below_mask_);  // what is left of an earlier mask was in vain
    spans_below_mask_ = lines_.spans();
    const std::int64_t stride = unit.group < panel.rows ? panel.mask_offset[unit.group] - panel.mask_offset[0] : 0;
    lines_.add(element(mask.data, mask.dtype, panel.mask_offset[0] + keys.begin), stride * size_of(mask.dtype),
               (keys.end - keys.begin) * size_of(mask.dtype), (panel.rows + unit.group - 1) / unit.group);
  }

  FA_INLINE void step() {
    if (!lines_.are_asked_for()) {
      lines_.ask();
      lines_.ask();
    } else if (!keys_.is_done()) {
      keys_.step();
    } else if (!rows_.is_done()) {
      rows_.step();
    }
  }

 private:
  // What makes a word: neighbours along the dims of a row, or of two rows.
  static constexpr bool along_dims = true;
  static constexpr bool as_values = Operand::per_word == 1;

  static KeyRange seen_keys(const Unit& unit, KeyBlock block) {
    const KeyRange seen = visible_keys_of_unit(unit);
    return {max_of(seen.begin, block.begin), min_of(seen.end, block.begin + block.size)};
  }

  void forget_block() {
    keys_.clear();
    spans_of_rows_ = min_of(spans_of_rows_, lines_.spans());
    lines_.keep(spans_of_rows_);
    spans_below_mask_ = spans_of_rows_;
  }

  static Form form_of(DType dtype, bool is_along_dims) {
    if (Operand::per_word > 1) return is_along_dims ? Form::words : Form::pairs;
    return dtype == DType::float32 ? Form::words : Form::halves;
  }
  static int dims_of_piece(bool is_along_dims) { return is_along_dims ? dim_panel * Operand::per_word : dim_panel; }

  // Rows of whole pieces, side by side, of a dtype that a copy knows.
  static bool have_form(const KeyTensor& rows, bool is_along_dims) {
    const DType dtype = rows.tensor->dtype;
    const bool is_known = Operand::per_word > 1 ? dtype == DType::bfloat16 : dtype == DType::float32 || dtype == DType::float16;
    return is_known && rows.tensor->strides.dim == 1 && rows.dim % dims_of_piece(is_along_dims) == 0;
  }

  static Span span_of(const ConstTensor& tensor, const char* from, std::int32_t rows, int dim, bool is_along_dims, float* to,
                      std::int64_t to_row, std::int64_t to_piece) {
    const std::int64_t stride = tensor.strides.seq * size_of(tensor.dtype);
    const int rows_of_word = is_along_dims ? 1 : Operand::per_word;
    return {form_of(tensor.dtype, is_along_dims),
            rows / rows_of_word,
            dim / dims_of_piece(is_along_dims),
            from,
            stride * rows_of_word,
            stride,
            to,
            to_row,
            to_piece};
  }

  void add_lines(const ConstTensor& tensor, const char* from, std::int32_t rows, int dim) {
    const std::int64_t size = size_of(tensor.dtype);
    if (tensor.strides.dim == 1) lines_.add(from, tensor.strides.seq * size, dim * size, rows);
  }

  // Slots of a block that are not seen.
  static void zero_others(const AttentionProblem& problem, KeyRange keys, KeyBlock block, BlockParts parts) {
    const auto zero = [&](float* from, std::int64_t floats) {
      std::memset(from, 0, static_cast<std::size_t>(floats) * sizeof(float));
    };
    const auto zero_slots = [&](std::int64_t begin, std::int64_t end) {
      if (begin >= end) return;
      const std::int64_t k_row = words<Operand>(problem.head_dim);
      zero(parts.k + begin * k_row, (end - begin) * k_row);
      for (int panel = 0; panel < panels_of(problem.head_dim_v); ++panel) {
        zero(parts.v + (std::int64_t{panel} * words<Operand>(block.size) + begin / Operand::per_word) * dim_panel,
             (end - begin) / Operand::per_word * dim_panel);
      }
    };
    zero_slots(0, keys.begin - block.begin);
    zero_slots(keys.end - block.begin, block.size);
  }

  // Of lines_: first rows, then keys, then a mask.
  int spans_of_rows_ = 0;
  int spans_below_mask_ = 0;
  LinesAhead lines_;
  Copies keys_;
  Copies rows_;
};

struct NothingAhead : NothingBeside {
  static bool can_copy(const AttentionProblem&, const AttentionInputs&, const Unit&, KeyBlock) { return false; }
  void copy_block(const AttentionProblem&, const AttentionInputs&, const Unit&, KeyBlock, BlockParts) {}
  void finish_block() {}
  void ask_for_block(const AttentionProblem&, const AttentionInputs&, const Unit&, KeyBlock) {}
  bool add_rows(const AttentionProblem&, const AttentionInputs&, const Unit&, RowRange, float*) { return false; }
  void finish_rows() {}
  void add_mask(const MaskTensor&, const Unit&, const RowPanel&, KeyRange) {}
};

template <class Operand>
using PackAhead = std::conditional_t<FA_PACK_AHEAD != 0, SomePackAhead<Operand>, NothingAhead>;

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
