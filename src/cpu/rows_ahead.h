// Rows of q, k and v that a thread reads after those at hand. They are asked for a line at a time while it multiplies, since a
// head's rows lie far apart and a thread that packs them waits for each; all at once would take as long (docs/performance.md).
#pragma once

#include "cpu/kernels.h"
#include "cpu/key_row.h"

#if !defined(FA_ROWS_AHEAD)  // 1: the level's processors multiply as fast while they fetch
#define FA_ROWS_AHEAD 0
#endif

namespace flash_attn::cpu::FA_LEVEL {
namespace {

struct NoRowsAhead {
  FA_INLINE void ask() {}
};

class SomeRowsAhead {
 public:
  SomeRowsAhead(const AttentionProblem& problem, const AttentionInputs& inputs, const Foreseen& next) {
    if (!next.unit || next.unit->sequence.k.length > most_keys(problem)) return;
    add_keys(problem, inputs, keys_of(problem, inputs), *next.unit, next.keys);
    add_keys(problem, inputs, values_of(problem, inputs), *next.unit, next.keys);
    add_queries(problem, inputs.q, *next.unit, next.rows);
  }

  // One line, or nothing when all were asked for.
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

 private:
  struct Span {
    const char* row;
    std::int64_t stride;  // bytes, as those of a row
    std::int64_t bytes;
    std::int64_t rows;
  };

  void add(const ConstTensor& tensor, std::int64_t offset, std::int64_t rows, std::int64_t row_elements) {
    if (rows <= 0 || tensor.strides.dim != 1) return;
    const char* row = element(tensor.data, tensor.dtype, offset);
    const std::int64_t into_line = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(row) % cache_line);
    const std::int64_t size = size_of(tensor.dtype);
    span_[spans_++] = {row - into_line, tensor.strides.seq * size, into_line + row_elements * size, rows};
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

  int spans_ = 0;
  std::int64_t line_ = 0;  // of the last span's first row, in bytes
  Span span_[3];
};

#if FA_ROWS_AHEAD
using RowsAhead = SomeRowsAhead;
#else
struct RowsAhead : NoRowsAhead {
  RowsAhead(const AttentionProblem&, const AttentionInputs&, const Foreseen&) {}
};
#endif

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
