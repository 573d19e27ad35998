// int8 numbers multiplied in integers: words of two int16, the products of both halves summed up in int32. A vector of words
// holds twice the numbers that one of float32 does, and needs no conversion to it.
#pragma once

#include "cpu/operand.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// 1: the level multiplies and adds pairs of int16 in an instruction or two; or has the tile shapes of one that does.
#if !defined(FA_INTEGER_DOT)
#if defined(__SSE2__) || FA_VECTOR_BYTES > 16
#define FA_INTEGER_DOT 1
#else
#define FA_INTEGER_DOT 0
#endif
#endif

namespace flash_attn::cpu::FA_LEVEL {
namespace {

constexpr int int8_chunk = 2 * lanes;                                           // numbers of a vector of words
constexpr int integer_words(int dim) { return round_up(dim, int8_chunk) / 2; }  // of a row, whole vectors
using Bytes = std::int8_t __attribute__((vector_size(int8_chunk)));

FA_INLINE Bytes load_bytes(const char* p) {
  Bytes x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
FA_INLINE IVec load_words(const std::int32_t* p) {
  IVec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
FA_INLINE void store_words(std::int32_t* p, IVec x) { __builtin_memcpy(p, &x, sizeof(x)); }

struct IntegerOperand {
  // acc + low(a) low(b) + high(a) high(b).
  static FA_INLINE IVec multiply_add(IVec acc, IVec a, IVec b) {
#if defined(__AVX512VNNI__) && FA_VECTOR_BYTES == 64
    return reinterpret_cast<IVec>(
        _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX512BW__) && FA_VECTOR_BYTES == 64
    return acc + reinterpret_cast<IVec>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
    return acc + reinterpret_cast<IVec>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__) && FA_VECTOR_BYTES == 16
    return acc + reinterpret_cast<IVec>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
  }

  // Neighbouring numbers of a row.
  static FA_INLINE IVec word_of_row(Bytes row) {
#if defined(__AVX512BW__) && FA_VECTOR_BYTES == 64
    return reinterpret_cast<IVec>(_mm512_cvtepi8_epi16(reinterpret_cast<__m256i>(row)));
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
    return reinterpret_cast<IVec>(_mm256_cvtepi8_epi16(reinterpret_cast<__m128i>(row)));
#else
    using Int16s = std::int16_t __attribute__((vector_size(FA_VECTOR_BYTES)));
    return reinterpret_cast<IVec>(__builtin_convertvector(row, Int16s));
#endif
  }

  // The numbers of two rows at the same place: of the first or of the second eight places of each sixteen, see order_dims.
  template <int second>
  static FA_INLINE IVec word_of_rows(Bytes a, Bytes b) {
#if defined(__AVX512BW__) && FA_VECTOR_BYTES == 64
    const auto x = reinterpret_cast<__m256i>(a), y = reinterpret_cast<__m256i>(b);
    return word_of_row(reinterpret_cast<Bytes>(second ? _mm256_unpackhi_epi8(x, y) : _mm256_unpacklo_epi8(x, y)));
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
    const auto x = reinterpret_cast<__m128i>(a), y = reinterpret_cast<__m128i>(b);
    return word_of_row(reinterpret_cast<Bytes>(second ? _mm_unpackhi_epi8(x, y) : _mm_unpacklo_epi8(x, y)));
#else
    Bytes pairs;
    for (int i = 0; i < lanes; ++i) {
      const int place = lanes < 16 ? second * lanes + i : i / 8 * 16 + second * 8 + i % 8;
      pairs[2 * i] = a[place];
      pairs[2 * i + 1] = b[place];
    }
    return word_of_row(pairs);
#endif
  }

  // [int8_chunk] sums over words of rows, in the order of places.
  static FA_INLINE void order_dims([[maybe_unused]] float* sums) {
#if FA_VECTOR_BYTES == 64
    const Vec low = load(sums);
    const Vec high = load(sums + lanes);
    store(sums, __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23));
    store(sums + lanes, __builtin_shufflevector(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
#endif
  }

  // To nearest: 1.5 * 2^23 leaves an integer in the low bits of a float, the other 16 are not part of it.
  static FA_INLINE IVec rounded(Vec x) { return bits_of(x + 12582912.0f); }

  // Of two numbers of magnitude below 2^15.
  static FA_INLINE IVec word(Vec low, Vec high) { return (rounded(low) & 0xffff) | (rounded(high) << 16); }
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
