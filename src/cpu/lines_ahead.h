// Lines that a thread reads soon, asked for a few at a time while it multiplies: rows lie far apart, and whoever reads them
// waits for each. All at once would take as long (docs/performance.md).
#pragma once

#include "cpu/row_panel.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

class LinesAhead {
 public:
  static constexpr int most_spans = 24;

  // Rows of `bytes` bytes that lie `stride` bytes apart. What was added last is asked for first.
  void add(const char* row, std::int64_t stride, std::int64_t bytes, std::int64_t rows) {
    if (rows <= 0 || spans_ == most_spans) return;
    span_[spans_++] = {row, stride, bytes, rows};
    byte_ = 0;
  }

  // Forgets what was added after the first `count` spans.
  void keep(int count) {
    if (spans_ <= count) return;
    spans_ = count;
    byte_ = 0;
  }
  int spans() const { return spans_; }
  bool are_asked_for() const { return spans_ == 0; }

  FA_INLINE void ask() {
    if (spans_ == 0) return;
    Span& span = span_[spans_ - 1];
    // The last byte's line, too, wherever the row begins.
    __builtin_prefetch(span.row + min_of(byte_, span.bytes - 1));
    byte_ += cache_line;
    if (byte_ < span.bytes + cache_line - 1) return;
    byte_ = 0;
    span.row += span.stride;
    if (--span.rows == 0) --spans_;
  }

 private:
  struct Span {
    const char* row;
    std::int64_t stride;
    std::int64_t bytes;
    std::int64_t rows;
  };

  int spans_ = 0;
  std::int64_t byte_ = 0;  // of the last span's first row
  Span span_[most_spans];
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
