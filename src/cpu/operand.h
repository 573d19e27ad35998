// What a packed operand of a product holds in each 32-bit word, and how two words multiply.
//
// Float32Operand: one float32. Bfloat16Operand: two bfloat16 neighbours along the product's depth, for chips whose dot product
// takes pairs. MatrixOperand: the same, in whole tiles of a matrix unit, and of as many terms as a number needs. Everything
// else (layouts, loops) is the same: a word is a word, and the depth is counted in words.
#pragma once

#include <type_traits>

#include "cpu/convert.h"

#if !defined(FA_BFLOAT16_DOT)  // 1: the level multiplies bfloat16 pairs
#define FA_BFLOAT16_DOT 0
#endif

namespace flash_attn::cpu::FA_LEVEL {
namespace {

struct Float32Operand {
  static constexpr int terms = 1;
  static constexpr int per_word = 1;
  static constexpr int word_granule = 1;  // a depth is a multiple of so many words, zeros after its end

  static FA_INLINE Vec multiply_add(Vec acc, Vec a, Vec b) { return acc + a * b; }
  // The word of `per_word` neighbours along the depth.
  static FA_INLINE Vec word(const Vec (&neighbours)[per_word]) { return neighbours[0]; }
  // 0 for a number that is not finite.
  static FA_INLINE Vec finite(Vec word) { return select(is_finite(word), word, Vec{}); }
};

// To nearest even; arithmetic makes only quiet NaNs.
FA_INLINE Half half_of(Vec x) {
#if defined(__AVX512BF16__) && FA_VECTOR_BYTES == 64
  return reinterpret_cast<Half>(_mm512_cvtneps_pbh(x));
#else
  return to_bfloat16(x);
#endif
}

// Of a number that is a bfloat16.
FA_INLINE Half high_half(Vec x) { return __builtin_convertvector(reinterpret_cast<UVec>(x) >> 16, Half); }

using Shorts = std::uint16_t __attribute__((vector_size(FA_VECTOR_BYTES)));

struct Bfloat16Operand {
  static constexpr int terms = 1;
  static constexpr int per_word = 2;
  static constexpr int word_granule = 1;

  static FA_INLINE Vec multiply_add(Vec acc, Vec a, Vec b) {
#if defined(__AVX512BF16__) && FA_VECTOR_BYTES == 64
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    return acc + low(a) * low(b) + high(a) * high(b);
#endif
  }

  static FA_INLINE Vec word(const Vec (&neighbours)[per_word]) {
#if defined(__AVX512BF16__) && FA_VECTOR_BYTES == 64
    const auto halves = reinterpret_cast<Shorts>(_mm512_cvtne2ps_pbh(neighbours[1], neighbours[0]));
    return reinterpret_cast<Vec>(__builtin_shufflevector(halves, halves, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
#endif
    return from_bits(reinterpret_cast<IVec>((rounded(neighbours[0]) >> 16) | (rounded(neighbours[1]) & 0xffff0000u)));
  }

  // The nearest bfloat16.
  static FA_INLINE Vec nearest(Vec x) { return from_bits(reinterpret_cast<IVec>(rounded(x) & 0xffff0000u)); }

  static FA_INLINE Vec finite(Vec word) {
    constexpr std::int32_t low_exponent = 0x7f80;
    constexpr std::int32_t high_exponent = 0x7f800000;
    const IVec bits = bits_of(word);
    const IVec keep_low = (bits & low_exponent) != low_exponent;
    const IVec keep_high = (bits & high_exponent) != high_exponent;
    return from_bits(bits & ((keep_low & 0xffff) | (keep_high & ~0xffff)));
  }

  // The word of a's half and b's half at each dim of two rows of bfloat16, for the first or the second four dims of each eight.
  template <int second>
  static FA_INLINE Vec word_of_rows(Vec a, Vec b) {
    Shorts words;
#if defined(__AVX512BW__) && FA_VECTOR_BYTES == 64
    const auto x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
    words = reinterpret_cast<Shorts>(second ? _mm512_unpackhi_epi16(x, y) : _mm512_unpacklo_epi16(x, y));
#else
    for (int i = 0; i < 2 * lanes; ++i) {
      words[i] = reinterpret_cast<Shorts>(i % 2 ? b : a)[i / 8 * 8 + second * 4 + i % 8 / 2];
    }
#endif
    return reinterpret_cast<Vec>(words);
  }

 protected:
  static FA_INLINE Vec low(Vec x) { return from_bits(bits_of(x) << 16); }
  static FA_INLINE Vec high(Vec x) { return from_bits(bits_of(x) & static_cast<std::int32_t>(0xffff0000)); }
  // To nearest even in the high half. NaN stays NaN: arithmetic makes only quiet ones, whose low bits are 0.
  static FA_INLINE UVec rounded(Vec x) {
    const UVec bits = reinterpret_cast<UVec>(x);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
};

// A number is the sum of `count` bfloat16 terms, each of which has rows of words of its own: bfloat16 is one, float16 two,
// float32 three. Of a product, terms i and j count where i + j < count; what is left out is smaller than float32's rounding, or
// than that of a 16-bit result.
template <int count>
struct MatrixOperand : Bfloat16Operand {
  static constexpr int terms = count;
  static constexpr int word_granule = 16;

  // The terms of x; the last one is not rounded yet. Of two, the first is the nearest, since their small product is left out;
  // of three, it is cut off, so that a float32 is their sum to the bit and none becomes infinite. What is not finite has one
  // term.
  static FA_INLINE void split(Vec x, Vec (&parts)[count]) {
    for (int i = 0; i + 1 < count; ++i) {
      parts[i] = count == 2 ? nearest(x) : high(x);
      x = select(is_finite(parts[i]), x - parts[i], Vec{});
    }
    parts[count - 1] = x;
  }

  // The word of two neighbours, for each term.
  static FA_INLINE void words_of_neighbours(Vec a, Vec b, Vec (&words)[count]) {
    Vec first[count];
    Vec second[count];
    split(a, first);
    split(b, second);
    for (int i = 0; i < count; ++i) {
      words[i] = count == 3 || i + 1 < count ? word_of_high(first[i], second[i]) : word({first[i], second[i]});
    }
  }

  // The same of P and dS, which are finite and as many as the scores.
  static FA_INLINE void split_halves(Vec x, Half (&halves)[count]) {
    for (int i = 0; i + 1 < count; ++i) {
      const Vec part = count == 2 ? nearest(x) : high(x);
      halves[i] = high_half(part);
      x -= part;
    }
    halves[count - 1] = count == 3 ? high_half(x) : half_of(x);
  }
  // As words of two neighbours.
  static FA_INLINE void split_words(Vec a, Vec b, Vec (&words)[count]) {
    for (int i = 0; i < count; ++i) {
      if constexpr (count == 3) {
        words[i] = word_of_high(a, b);
        a -= high(a);
        b -= high(b);
      } else {
        words[i] = word({a, b});
        a -= low(words[i]);
        b -= high(words[i]);
      }
    }
  }
  // And back.
  static FA_INLINE void join_words(const Vec (&words)[count], Vec (&neighbours)[2]) {
    neighbours[0] = neighbours[1] = Vec{};
    for (int i = count - 1; i >= 0; --i) {
      neighbours[0] += low(words[i]);
      neighbours[1] += high(words[i]);
    }
  }

 private:
  // Cut off: also what is exact but for a subnormal number's last bits.
  static FA_INLINE Vec word_of_high(Vec a, Vec b) {
    return from_bits(reinterpret_cast<IVec>(reinterpret_cast<UVec>(a) >> 16) | bits_of(high(b)));
  }
};

// visit(i, j, is i new, is j new) of the terms of two factors whose product counts, the largest last or with one after it.
template <int terms, class Visit>
FA_INLINE void visit_terms(const Visit& visit) {
  constexpr Constant<1> yes;
  constexpr Constant<0> no;
  if constexpr (terms == 3) {
    visit(Constant<2>{}, Constant<0>{}, yes, yes);
    visit(Constant<1>{}, Constant<0>{}, yes, no);
    visit(Constant<1>{}, Constant<1>{}, no, yes);
    visit(Constant<0>{}, Constant<1>{}, yes, no);
    visit(Constant<0>{}, Constant<2>{}, no, yes);
    visit(Constant<0>{}, Constant<0>{}, no, yes);
  } else if constexpr (terms == 2) {
    visit(Constant<1>{}, Constant<0>{}, yes, yes);
    visit(Constant<0>{}, Constant<0>{}, yes, no);
    visit(Constant<0>{}, Constant<1>{}, no, yes);
  } else {
    visit(Constant<0>{}, Constant<0>{}, yes, yes);
  }
}

template <int terms>
constexpr int pairs_of_terms = terms*(terms + 1) / 2;

// By the dtype of a pass.
struct Operands {
#if FA_MATRIX_TILES
  using Bfloat16 = MatrixOperand<1>;
  using Float16 = MatrixOperand<2>;
  using Float32 = MatrixOperand<3>;
#else
  using Bfloat16 = std::conditional_t<FA_BFLOAT16_DOT != 0, Bfloat16Operand, Float32Operand>;
  using Float16 = Float32Operand;
  using Float32 = Float32Operand;
#endif
};

template <class Operand>
constexpr bool is_matrix_operand = Operand::word_granule > 1;

// Neighbours that a depth is a multiple of.
template <class Operand>
constexpr int depth_granule = Operand::per_word* Operand::word_granule;

template <class Operand>
constexpr int words(int depth) {
  return round_up(depth, depth_granule<Operand>) / Operand::per_word;
}

// Of a row of numbers: its terms one after the other.
template <class Operand>
constexpr int row_words(int dim) {
  return Operand::terms * words<Operand>(dim);
}

// Floats that a row of words takes, whatever the operand of the level.
constexpr int row_floats(int dim) { return FA_MATRIX_TILES ? row_words<MatrixOperand<3>>(dim) : dim; }

// Words whose neighbours lie side by side: packed [terms][words(n)] from row [n], zero past its end. In place allowed where
// that is one term.
template <class Operand>
inline void pack_row(const float* row, int n, float* packed) {
  if constexpr (Operand::per_word == 1) {
    if (row != packed) std::memmove(packed, row, static_cast<std::size_t>(n) * sizeof(float));
  } else {
    const auto pack = [&](Vec values, int first, int count) FA_INLINE_IF_FAST {
      Vec parts[Operand::terms] = {values};
      if constexpr (Operand::terms > 1) Operand::split(values, parts);
      for (int term = 0; term < Operand::terms; ++term) {
        const bool is_exact = Operand::terms == 3 || term + 1 < Operand::terms;
        const Half bits = is_exact ? high_half(parts[term]) : to_bfloat16(parts[term]);
        char* halves = reinterpret_cast<char*>(packed + term * words<Operand>(n)) + 2 * first;
        std::memcpy(halves, &bits, 2 * static_cast<std::size_t>(count));
      }
    };
    int first = 0;
    for (; first + lanes <= n; first += lanes) pack(load(row + first), first, lanes);
    if (first < n) {
      float values[lanes] = {};
      std::memcpy(values, row + first, static_cast<std::size_t>(n - first) * sizeof(float));
      pack(load(values), first, round_up(n - first, 2));
    }
    const int used = round_up(n, 2) / 2;
    for (int term = 0; term < Operand::terms; ++term) {
      std::memset(packed + term * words<Operand>(n) + used, 0,
                  static_cast<std::size_t>(words<Operand>(n) - used) * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
