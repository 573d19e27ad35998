// Rows that a thread reads after those at hand: attn_mask's of the scores that it computes, and q, k and v of its next unit.
// They are asked for a line at a time while it multiplies, since they lie far apart and whoever reads them waits for each; all
// at once would take as long (docs/performance.md).
#pragma once

#include "cpu/kernels.h"
#include "cpu/key_row.h"
#include "cpu/products.h"
#include "cpu/row_panel.h"

#if !defined(FA_ROWS_AHEAD)  // 1: the level's processors multiply as fast while they fetch
#define FA_ROWS_AHEAD 0
#endif

namespace flash_attn::cpu::FA_LEVEL {
namespace {

class SomeRowsAhead {
 public:
  SomeRowsAhead(const AttentionProblem& problem, const AttentionInputs& inputs, const Foreseen& next) {
    if (!next.unit || next.unit->sequence.k.length > most_keys(problem)) return;
    add_keys(problem, inputs, keys_of(problem, inputs), *next.unit, next.keys);
    add_keys(problem, inputs, values_of(problem, inputs), *next.unit, next.keys);
    add_queries(problem, inputs.q, *next.unit, next.rows);
    spans_of_unit_ = spans_;
  }

  // To be asked for first. Heads that have masks of their own: only the first of a group.
  void add_mask(const MaskTensor& mask, const Unit& unit, const RowPanel& panel, KeyRange keys) {
    if (!mask.data || mask.key != 1) return;
    spans_ = min_of(spans_, spans_of_unit_);  // what is left of an earlier mask was in vain
    spans_of_unit_ = spans_;
    line_ = 0;
    const std::int64_t stride = unit.group < panel.rows ? panel.mask_offset[unit.group] - panel.mask_offset[0] : 0;
    add(element(mask.data, mask.dtype, panel.mask_offset[0] + keys.begin), stride * size_of(mask.dtype),
        (keys.end - keys.begin) * size_of(mask.dtype), (panel.rows + unit.group - 1) / unit.group);
  }

  // Two lines, or nothing when all were asked for.
  FA_INLINE void step() {
    ask();
    ask();
  }

 private:
  FA_INLINE void ask() {
    if (spans_ == 0) return;
    Span& span = span_[spans_ - 1];
    __builtin_prefetch(span.row + line_);
    line_ += cache_line;
    if (line_ < span.bytes) return;
    line_ = 0;
    span.row += span.stride;
    if (--span.rows == 0) --spans_;
  }

  struct Span {
    const char* row;
    std::int64_t stride;  // bytes, as those of a row
    std::int64_t bytes;
    std::int64_t rows;
  };

  void add(const char* row, std::int64_t stride, std::int64_t bytes, std::int64_t rows) {
    const std::int64_t into_line = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(row) % cache_line);
    span_[spans_++] = {row - into_line, stride, into_line + bytes, rows};
  }
  void add(const ConstTensor& tensor, std::int64_t offset, std::int64_t rows, std::int64_t row_elements) {
    if (rows <= 0 || tensor.strides.dim != 1) return;
    const std::int64_t size = size_of(tensor.dtype);
    add(element(tensor.data, tensor.dtype, offset), tensor.strides.seq * size, row_elements * size, rows);
  }

  // Of a unit's k and v: more would push out of L2 what is in use.
  static std::int64_t most_keys(const AttentionProblem& problem) {
    return 256 * 1024 / ((problem.head_dim + problem.head_dim_v) * size_of(problem.dtype));
  }

  // Pages are left out: each would be a span of its own.
  void add_keys(const AttentionProblem& problem, const AttentionInputs& inputs, const KeyTensor& source, const Unit& unit,
                KeyRange keys) {
    if (problem.page_size > 0 || source.quantization->scales) return;
    for_each_stretch(problem, inputs, unit.sequence, unit.batch, keys, [&](std::int32_t, std::int32_t count, KeySlot slot) {
      add(*source.tensor, slot.offset(source.tensor->strides, unit.kv_head), count, source.dim);
    });
  }

  // Of a group the heads lie side by side, or there is one.
  void add_queries(const AttentionProblem& problem, const ConstTensor& q, const Unit& unit, RowRange rows) {
    if (unit.group > 1 && q.strides.head != problem.head_dim) return;
    const std::int32_t first = rows.begin / unit.group;
    const std::int64_t offset = unit.batch * q.strides.batch + (unit.sequence.q.begin + std::int64_t{first}) * q.strides.seq +
                                unit.first_head * q.strides.head;
    add(q, offset, (rows.end + unit.group - 1) / unit.group - first, std::int64_t{unit.group} * problem.head_dim);
  }

  int spans_ = 0;          // the last one is asked for first
  int spans_of_unit_ = 0;  // the others are of a mask
  std::int64_t line_ = 0;  // of the last span's first row, in bytes
  Span span_[4];
};

#if FA_ROWS_AHEAD
using RowsAhead = SomeRowsAhead;
#else
struct RowsAhead : NothingBeside {
  RowsAhead(const AttentionProblem&, const AttentionInputs&, const Foreseen&) {}
  void add_mask(const MaskTensor&, const Unit&, const RowPanel&, KeyRange) {}
};
#endif

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
