// Copies of rows that go on beside something else, a few instructions a step: a product leaves the units that load and store
// mostly idle.
#pragma once

#include "cpu/row_words.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Rows of q, k or v to where they are packed, a panel of dims a step. A row is asked for some steps before it is read.
template <class Operand>
class RowCopies {
 public:
  static constexpr int most_spans = 24;

  enum class Form : std::uint8_t {
    words,   // copied as they lie
    halves,  // float16 becomes float32
    pairs,   // two rows of bfloat16 become words of neighbours
  };

  // Rows, or pairs of rows, that lie a stride apart, and where they go.
  struct Span {
    Form form;
    std::int32_t rows;
    std::int32_t pieces;  // of a row
    const char* from;
    std::int64_t from_row;    // bytes, to the next row
    std::int64_t second_row;  // bytes, to the other row of a pair
    float* to;
    std::int64_t to_row;  // floats, to the next row
    std::int64_t to_piece;
  };

  bool is_done() const { return copied_.span == spans_; }
  void clear() {
    spans_ = 0;
    copied_ = asked_ = {};
  }
  void add(const Span& span) {
    span_[spans_++] = span;
    steps_to_wait_ = steps_to_arrive;
  }

  FA_INLINE void step() {
    if (asked_.span != spans_) {
      ask();
      if (steps_to_wait_ > 0) {
        --steps_to_wait_;
        return;
      }
    }
    copy();
  }

 private:
  static constexpr int steps_to_arrive = 32;

  struct Place {
    int span = 0;
    std::int32_t row = 0;
    std::int32_t piece = 0;

    FA_INLINE void advance(const Span& s) {
      if (++piece < s.pieces) return;
      piece = 0;
      if (++row < s.rows) return;
      row = 0;
      ++span;
    }
  };

  static constexpr std::int64_t words_bytes = dim_panel * sizeof(float);
  static constexpr std::int64_t halves_bytes = dim_panel * sizeof(std::uint16_t);
  static FA_INLINE const char* piece_at(const Span& span, const Place& place) {
    return span.from + place.row * span.from_row + place.piece * (span.form == Form::words ? words_bytes : halves_bytes);
  }

  // The last byte's line, too, wherever a row begins.
  FA_INLINE void ask() {
    const Span& span = span_[asked_.span];
    const char* p = piece_at(span, asked_);
    __builtin_prefetch(p);
    if (span.form == Form::words) {
#pragma GCC unroll 2
      for (std::int64_t byte = cache_line; byte < words_bytes; byte += cache_line) __builtin_prefetch(p + byte);
      __builtin_prefetch(p + words_bytes - 1);
    } else {
      __builtin_prefetch(p + halves_bytes - 1);
      if (span.form == Form::pairs) {
        __builtin_prefetch(p + span.second_row);
        __builtin_prefetch(p + span.second_row + halves_bytes - 1);
      }
    }
    asked_.advance(span);
  }

  FA_INLINE void copy() {
    const Span& span = span_[copied_.span];
    const char* p = piece_at(span, copied_);
    float* to = span.to + copied_.row * span.to_row + copied_.piece * span.to_piece;
    if (span.form == Form::words) {
      const auto* words = reinterpret_cast<const float*>(p);
#pragma GCC unroll 2
      for (int n = 0; n < dim_vectors; ++n) store(to + n * lanes, load(words + n * lanes));
    } else {
#pragma GCC unroll 2
      for (int n = 0; n < dim_vectors; ++n)
        store(to + n * lanes, converted(p + n * lanes * sizeof(std::uint16_t), span.second_row));
    }
    copied_.advance(span);
  }

  static FA_INLINE Vec converted(const char* p, std::int64_t second_row) {
    if constexpr (Operand::per_word > 1) {
      return word_of_rows<Operand>({reinterpret_cast<const float*>(p), reinterpret_cast<const float*>(p + second_row)}, 0);
    } else {
      return load_as(DType::float16, reinterpret_cast<const std::uint16_t*>(p));
    }
  }

  int spans_ = 0;
  int steps_to_wait_ = 0;
  Place copied_;
  Place asked_;
  Span span_[most_spans];
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
