// Rows of any dtype to float32 and back, round to nearest even.
#pragma once

#include <cstring>

#include "attention_problem.h"
#include "cpu/tile.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

using Half = std::uint16_t __attribute__((vector_size(FA_VECTOR_BYTES / 2)));

FA_INLINE Vec from_bfloat16(Half x) { return reinterpret_cast<Vec>(__builtin_convertvector(x, UVec) << 16); }

FA_INLINE Half to_bfloat16(Vec x) {
  const UVec bits = reinterpret_cast<UVec>(x);
  const UVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UVec quiet_nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded, Half);
}

FA_INLINE Vec from_float16(Half x) {
#if defined(__AVX512F__) && FA_VECTOR_BYTES == 64
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(x));
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(x));
#else
  const UVec bits = __builtin_convertvector(x, UVec);
  const UVec magnitude = (bits & 0x7fffu) << 13;
  // The exponent is 15 - 127 too low; a product with 2^112 mends it and normalises subnormals at once.
  const Vec finite = reinterpret_cast<Vec>(magnitude) * 0x1p112f;
  const Vec special = reinterpret_cast<Vec>(magnitude | 0x7f800000u);
  const Vec value = (bits & 0x7c00u) == 0x7c00u ? special : finite;
  return reinterpret_cast<Vec>(reinterpret_cast<UVec>(value) | ((bits & 0x8000u) << 16));
#endif
}

FA_INLINE Half to_float16(Vec x) {
#if defined(__AVX512F__) && FA_VECTOR_BYTES == 64
  return reinterpret_cast<Half>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
  return reinterpret_cast<Half>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const UVec sign = (reinterpret_cast<UVec>(x) & 0x80000000u) >> 16;
  const UVec magnitude = reinterpret_cast<UVec>(x) & 0x7fffffffu;
  // Subnormal results: adding 0.5 makes the float unit round at bit 2^-24.
  const UVec subnormal = reinterpret_cast<UVec>(reinterpret_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
  const UVec normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const UVec infinite = splat(0x7c00u);
  const UVec nan = splat(0x7e00u);
  UVec result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? infinite : result;
  result = magnitude > 0x7f800000u ? nan : result;
  return __builtin_convertvector(result | sign, Half);
#endif
}

FA_INLINE Vec load_as(DType dtype, const std::uint16_t* p) {
  Half bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return dtype == DType::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

// Small integers, one a lane.
FA_INLINE Vec from_int8(const char* p) {
#if defined(__AVX512F__) && FA_VECTOR_BYTES == 64
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  std::int8_t __attribute__((vector_size(lanes))) bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Vec);
#endif
}
FA_INLINE Vec from_uint8(const char* p) {
#if defined(__AVX512F__) && FA_VECTOR_BYTES == 64
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  std::uint8_t __attribute__((vector_size(lanes))) bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Vec);
#endif
}
// Four bits each, the low half of a byte first.
FA_INLINE Vec from_uint4(const char* p) {
#if defined(__AVX2__) && FA_VECTOR_BYTES >= 32
  // The word of eight codes in each of their lanes, shifted to the lane's own.
  const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  std::int32_t words[lanes / 8];
  __builtin_memcpy(words, p, sizeof(words));
#if FA_VECTOR_BYTES == 64
  const __m512i codes = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
  return to_float(reinterpret_cast<IVec>(_mm512_srlv_epi32(codes, _mm512_broadcast_i64x4(shift))) & 15);
#else
  return to_float(reinterpret_cast<IVec>(_mm256_srlv_epi32(_mm256_set1_epi32(words[0]), shift)) & 15);
#endif
#else
  using Bytes = std::uint8_t __attribute__((vector_size(16)));
  std::uint64_t low = 0;
  __builtin_memcpy(&low, p, lanes / 2);
  const std::uint64_t __attribute__((vector_size(16))) words = {low, 0};
  const auto pairs = reinterpret_cast<Bytes>(words);
  const Bytes codes = __builtin_shufflevector(pairs & 15, pairs >> 4, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return from_uint8(reinterpret_cast<const char*>(&codes));
#endif
}

// Bytes an element takes; of an affine tensor, whose strides count words, a word.
FA_INLINE std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::boolean:
    case DType::int8:
      return 1;
    case DType::bfloat16:
    case DType::float16:
      return 2;
    default:
      return 4;
  }
}

FA_INLINE const char* element(const void* data, DType dtype, std::int64_t index) {
  return static_cast<const char*>(data) + index * size_of(dtype);
}
FA_INLINE char* element(void* data, DType dtype, std::int64_t index) {
  return static_cast<char*>(data) + index * size_of(dtype);
}

// Through a register: a vector read from what was just written a number at a time waits for all of it.
FA_INLINE float number_of(DType dtype, std::uint16_t bits) {
  const Half one = {bits};
  return (dtype == DType::bfloat16 ? from_bfloat16(one) : from_float16(one))[0];
}

// dst[n] = src[n * stride] in float32.
inline void read_row(DType dtype, const void* src, std::int64_t stride, int n, float* dst) {
  if (dtype == DType::float32) {
    const auto* p = static_cast<const float*>(src);
    if (stride == 1) {
      std::memcpy(dst, p, static_cast<std::size_t>(n) * sizeof(float));
    } else {
      for (int i = 0; i < n; ++i) dst[i] = p[i * stride];
    }
    return;
  }
  const auto* p = static_cast<const std::uint16_t*>(src);
  int i = 0;
  if (stride == 1) {
    for (; i + lanes <= n; i += lanes) store(dst + i, load_as(dtype, p + i));
  }
  for (; i < n; ++i) dst[i] = number_of(dtype, p[i * stride]);
}

// dst[n * stride] = src[n] in `dtype`.
inline void write_row(DType dtype, void* dst, std::int64_t stride, int n, const float* src) {
  if (dtype == DType::float32) {
    auto* p = static_cast<float*>(dst);
    if (stride == 1) {
      std::memcpy(p, src, static_cast<std::size_t>(n) * sizeof(float));
    } else {
      for (int i = 0; i < n; ++i) p[i * stride] = src[i];
    }
    return;
  }
  auto* p = static_cast<std::uint16_t*>(dst);
  const auto rounded = [&](const float* x) { return dtype == DType::bfloat16 ? to_bfloat16(load(x)) : to_float16(load(x)); };
  int i = 0;
  if (stride == 1) {
    for (; i + lanes <= n; i += lanes) {
      const Half bits = rounded(src + i);
      __builtin_memcpy(p + i, &bits, sizeof(bits));
    }
  }
  for (; i < n; i += lanes) {
    const int count = n - i < lanes ? n - i : lanes;
    float values[lanes] = {};
    std::memcpy(values, src + i, static_cast<std::size_t>(count) * sizeof(float));
    const Half bits = rounded(values);
    for (int lane = 0; lane < count; ++lane) p[(i + lane) * stride] = bits[lane];
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
