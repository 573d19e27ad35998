// MLX's codes multiplied as they lie: four products of a code, 0 to 255, and a byte with a sign, summed up in a word. A vector
// has four times the numbers that one of float32 does, and needs no conversion to it.
#pragma once

#include "cpu/integer_operand.h"

// 1: the level multiplies codes and bytes in one instruction; or has the tile shapes of one that does.
#if !defined(FA_CODE_DOT)
#if defined(__AVX512VNNI__) && FA_VECTOR_BYTES == 64
#define FA_CODE_DOT 1
#else
#define FA_CODE_DOT 0
#endif
#endif

namespace flash_attn::cpu::FA_LEVEL {
namespace {

template <DType dtype>
constexpr int codes_of_byte = dtype == DType::affine4 ? 2 : 1;
template <DType dtype>
constexpr float middle_code = codes_of_byte<dtype> == 1 ? 127.5f : 7.5f;
template <DType dtype>
constexpr int group_bytes = quantization_group / codes_of_byte<dtype>;

constexpr int code_chunk = 4 * lanes;                      // bytes of a vector
constexpr int group_vectors = quantization_group / lanes;  // of words of keys

// Words of a row of q, two for each word of codes.
constexpr int code_words(int dim) { return 2 * (dim / 4); }

#if FA_CODE_DOT
static_assert(lanes == 16, "the order of words of keys is that of 512 bits");
#endif

struct CodeOperand {
  // acc + the products of four codes and four bytes.
  static FA_INLINE IVec multiply_add(IVec acc, IVec codes, IVec bytes) {
#if defined(__AVX512VNNI__) && FA_VECTOR_BYTES == 64
    return reinterpret_cast<IVec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(codes),
                                                      reinterpret_cast<__m512i>(bytes)));
#else
    for (int i = 0; i < 4; ++i) acc += ((codes >> (8 * i)) & 255) * ((bytes << (24 - 8 * i)) >> 24);
    return acc;
#endif
  }

  // The codes of words: of each byte its one, or the low ones and the high ones of all.
  template <DType dtype>
  static FA_INLINE IVec codes_of_words(IVec words, int high) {
    if constexpr (codes_of_byte<dtype> == 1) return words;
    return (high ? words >> 4 : words) & 0x0f0f0f0f;
  }

  // The codes of four keys at the same dim, a dim a word, of a group's dims: in the order that order_dims undoes.
  template <DType dtype>
  static FA_INLINE void words_of_keys(const char* const (&keys)[4], int group, IVec (&words)[group_vectors]) {
    if constexpr (codes_of_byte<dtype> == 1) {
      words_of_bytes(keys, group * group_bytes<dtype>, words);
    } else {
      IVec pairs[2];
      words_of_few_bytes(keys, group * group_bytes<dtype>, pairs);
#pragma GCC unroll 4
      for (int i = 0; i < group_vectors; ++i) words[i] = codes_of_words<dtype>(pairs[i / 2], i % 2);
    }
  }

  // [dim] sums over words of keys, in the order of dims.
  template <DType dtype>
  static inline void order_dims(float* sums, int dim) {
    for (int d = 0; d < dim; d += quantization_group) {
      if constexpr (codes_of_byte<dtype> == 1) {
        order_bytes(sums + d);
      } else {
        order_pairs(sums + d);
      }
    }
  }

 private:
  // Of 64 bytes of each key; words[i] has in each part p the bytes from 16 p + 4 i on.
  static FA_INLINE void words_of_bytes(const char* const (&keys)[4], int at, IVec (&words)[4]) {
#if defined(__AVX512BW__) && FA_VECTOR_BYTES == 64
    __m512i rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) rows[i] = _mm512_loadu_si512(keys[i] + at);
    const __m512i low[2] = {_mm512_unpacklo_epi8(rows[0], rows[1]), _mm512_unpacklo_epi8(rows[2], rows[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi8(rows[0], rows[1]), _mm512_unpackhi_epi8(rows[2], rows[3])};
    words[0] = reinterpret_cast<IVec>(_mm512_unpacklo_epi16(low[0], low[1]));
    words[1] = reinterpret_cast<IVec>(_mm512_unpackhi_epi16(low[0], low[1]));
    words[2] = reinterpret_cast<IVec>(_mm512_unpacklo_epi16(high[0], high[1]));
    words[3] = reinterpret_cast<IVec>(_mm512_unpackhi_epi16(high[0], high[1]));
#else
    for (int i = 0; i < 4; ++i) {
      for (int lane = 0; lane < lanes; ++lane) words[i][lane] = word_of(keys, at + lane / 4 * 16 + 4 * i + lane % 4);
    }
#endif
  }

  static inline void order_bytes(float* sums) {
    float group[quantization_group];
    __builtin_memcpy(group, sums, sizeof(group));
    for (int i = 0; i < group_vectors; ++i) {
      for (int part = 0; part < lanes / 4; ++part) {
        __builtin_memcpy(sums + 16 * part + 4 * i, group + i * lanes + 4 * part, sizeof(Part));
      }
    }
  }

  // Where a part of the words of few bytes begins.
  static constexpr int byte_of_part(int i, int part) { return 4 * i + part % 2 * 16 + part / 2 * 8; }

  // Of 32 bytes of each key.
  static FA_INLINE void words_of_few_bytes(const char* const (&keys)[4], int at, IVec (&words)[2]) {
#if defined(__AVX512BW__) && FA_VECTOR_BYTES == 64
    __m256i rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) rows[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys[i] + at));
    const auto bytes_of = [](__m256i a, __m256i b) FA_INLINE_IF_FAST {
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi8(a, b)), _mm256_unpackhi_epi8(a, b), 1);
    };
    const __m512i first = bytes_of(rows[0], rows[1]);
    const __m512i second = bytes_of(rows[2], rows[3]);
    words[0] = reinterpret_cast<IVec>(_mm512_unpacklo_epi16(first, second));
    words[1] = reinterpret_cast<IVec>(_mm512_unpackhi_epi16(first, second));
#else
    for (int i = 0; i < 2; ++i) {
      for (int lane = 0; lane < lanes; ++lane) words[i][lane] = word_of(keys, at + byte_of_part(i, lane / 4) + lane % 4);
    }
#endif
  }

  // Of each byte its low code, then the high one.
  static inline void order_pairs(float* sums) {
    float pairs[2][quantization_group / 2];  // [vector of bytes], two bytes a part of the first half and two of the second
    for (int i = 0; i < 2; ++i) {
      const Vec even = load(sums + 2 * i * lanes);
      const Vec odd = load(sums + (2 * i + 1) * lanes);
      store(pairs[i], unpack_low(even, odd));
      store(pairs[i] + lanes, unpack_high(even, odd));
    }
    for (int i = 0; i < 2; ++i) {
      for (int part = 0; part < lanes / 4; ++part) {
        float* to = sums + 2 * byte_of_part(i, part);
        __builtin_memcpy(to, pairs[i] + 4 * part, sizeof(Part));
        __builtin_memcpy(to + 4, pairs[i] + lanes + 4 * part, sizeof(Part));
      }
    }
  }

  static FA_INLINE std::int32_t word_of(const char* const (&keys)[4], int byte) {
    const char bytes[4] = {keys[0][byte], keys[1][byte], keys[2][byte], keys[3][byte]};
    std::int32_t word;
    __builtin_memcpy(&word, bytes, sizeof(word));
    return word;
  }
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
