// exp2 and tanh on vectors.
#pragma once

#include "cpu/tile.h"
#include "semantics/softmax.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// By Horner's rule, the coefficient of the highest power first.
template <class... Coefficients>
FA_INLINE Vec polynomial(Vec x, float highest, Coefficients... rest) {
  Vec p = splat(highest);
  ((p = p * x + rest), ...);
  return p;
}

// 2^(i / count).
template <int count>
struct RootsOf2 {
  float value[count] = {};
  constexpr explicit RootsOf2(double first) {
    double root = 1.0;
    for (float& x : value) {
      x = static_cast<float>(root);
      root *= first;
    }
  }
};
alignas(64) constexpr RootsOf2<32> roots_of_2(1.0218971486541166);

// The bits of 2^(i / 8), less those of i three places below the exponent.
struct EighthRootsOf2 {
  std::int32_t bits[8] = {};
  constexpr EighthRootsOf2() {
    constexpr RootsOf2<8> roots(1.0905077326652577);
    for (int i = 0; i < 8; ++i) bits[i] = __builtin_bit_cast(std::int32_t, roots.value[i]) - (i << 20);
  }
};
alignas(32) constexpr EighthRootsOf2 eighth_roots_of_2;

// 2^x for x <= 0 and a little above; exactly 0 below -127, NaN stays NaN. Where some product has its softmax beside it, for any
// x: inf from 128 on.
FA_INLINE Vec exp2_of(Vec x) {
#if defined(__AVX512DQ__) && FA_VECTOR_BYTES == 64
  // 1.8e-7 relative: x is a multiple of 1 / 32 below it and a rest, whose polynomial is 1 at 0 and within 6.6e-8. Below -126
  // the result would be subnormal.
  constexpr int below = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  constexpr float round_to_32nds = 393216.0f;  // 1.5 * 2^18: adding it leaves them in the low bits
  const __mmask16 is_normal = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
  const __m512i place = _mm512_castps_si512(_mm512_add_round_ps(x, splat(round_to_32nds), below));
  const Vec root = _mm512_permutex2var_ps(load(roots_of_2.value), place, load(roots_of_2.value + lanes));
  const Vec r = _mm512_reduce_ps(x, 5 << 4 | below);
  return _mm512_maskz_scalef_ps(is_normal, root + root * r * polynomial(r, 0.2426556874f, 0.6931236540f), x);
#elif defined(__AVX2__) && FA_VECTOR_BYTES == 32
  // 1.6e-7 relative: x is the nearest eighth and a rest, whose polynomial is 1 at 0 and within 2.5e-8. An integer addition
  // brings the integer to the exponent of the root: 0 for 2^-127, a subnormal number above it.
  constexpr float round_to_8ths = 1572864.0f;  // 1.5 * 2^20: adding it leaves them in the low bits
  x = larger_of(splat(-127.0f), x);
  const Vec shifted = x + round_to_8ths;
  const Vec f = x - (shifted - round_to_8ths);
  const auto eighths = reinterpret_cast<__m256i>(shifted);
  const __m256i roots = _mm256_load_si256(reinterpret_cast<const __m256i*>(eighth_roots_of_2.bits));
  const __m256i root = _mm256_add_epi32(_mm256_permutevar8x32_epi32(roots, eighths), _mm256_slli_epi32(eighths, 20));
  return reinterpret_cast<Vec>(root) * polynomial(f, 0.05550410866f, 0.2402576f, 0.6931471806f, 1.0f);
#else
  // 1.7e-7 relative: x is the nearest integer and a rest.
  constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low mantissa bits
  x = larger_of(splat(-127.0f), x);
  if constexpr (softmax_beside || FA_MATRIX_TILES) x = smaller_of(splat(128.0f), x);
  const Vec shifted = x + round_to_integer;
  const Vec f = x - (shifted - round_to_integer);
  const Vec p = polynomial(f, 0.001326472391f, 0.00967151287f, 0.05550733754f, 0.2402224208f, 0.6931469776f, 1.0f);
  // A product, not an integer addition to the exponent: 2^-127 is built as 0, and NaN survives it.
  return p * from_bits((bits_of(shifted) << 23) + 0x3f800000);
#endif
}

// log2(x) for normal x > 0, within 2e-7 of the larger of the result and 1; inf and NaN stay. x is 2^e m with m within a factor
// of sqrt(2) of 1, and log(m) the series of 2 atanh((m - 1) / (m + 1)).
FA_INLINE Vec log2_of(Vec x) {
  constexpr std::int32_t sqrt_half = 0x3f3504f3;
  const IVec exponent = (bits_of(x) - sqrt_half) >> 23;
  const Vec m = from_bits(bits_of(x) - (exponent << 23));
  const Vec s = (m - 1.0f) / (m + 1.0f);
  const Vec s2 = s * s;
  const Vec p =
      polynomial(s2, 2.0f / 9.0f * log2_e, 2.0f / 7.0f * log2_e, 2.0f / 5.0f * log2_e, 2.0f / 3.0f * log2_e, 2.0f * log2_e);
  return select(is_finite(x), p * s + to_float(exponent), x);
}

// Rational approximation of degree 13 / 6 on [-7.905, 7.905] (Eigen's coefficients), 2.6e-7 relative; NaN stays NaN.
FA_INLINE Vec tanh_of(Vec x) {
  constexpr float limit = 7.90531110763549805f;
  x = smaller_of(splat(limit), larger_of(splat(-limit), x));
  const Vec x2 = x * x;
  const Vec p = polynomial(x2, -2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                           1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f);
  const Vec q = polynomial(x2, 1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f);
  return x * p / q;
}

// The words that src/semantics needs, for vectors.
struct VectorWords {
  static FA_INLINE UVec mul_hi(UVec a, UVec b) { return FA_LEVEL::mul_hi(a, b); }
  static FA_INLINE Vec tanh(Vec x) { return tanh_of(x); }
  static FA_INLINE Vec abs(Vec x) { return abs_of(x); }
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
