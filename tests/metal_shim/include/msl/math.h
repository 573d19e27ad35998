// Metal's functions of numbers. Arguments must agree in type: where Metal's overloads are ambiguous, so is this an error.
#pragma once

#include "msl/abi.h"
#include "msl/traits.h"
#include "msl/vec.h"

#define M_LOG2E_F 1.4426950408889634f
#define M_LN2_F 0.6931471805599453f
#define M_PI_F 3.14159265358979323846f
#define M_SQRT2_F 1.41421356237309504880f
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT __FLT_MAX__

namespace metal {

#define METAL_SHIM_FUNCTION(name, builtin)                                        \
  inline float name(float x) { return builtin(x); }                               \
  inline half name(half x) { return half(builtin(static_cast<float>(x))); }       \
  inline bfloat name(bfloat x) { return bfloat(builtin(static_cast<float>(x))); } \
  template <class T, int N>                                                       \
  inline vec<T, N> name(const vec<T, N>& v) {                                     \
    return metal_shim::each([](T x) { return name(x); }, v);                      \
  }
#define METAL_SHIM_FUNCTIONS                         \
  METAL_SHIM_FUNCTION(exp, __builtin_expf)           \
  METAL_SHIM_FUNCTION(exp2, __builtin_exp2f)         \
  METAL_SHIM_FUNCTION(log, __builtin_logf)           \
  METAL_SHIM_FUNCTION(log2, __builtin_log2f)         \
  METAL_SHIM_FUNCTION(sqrt, __builtin_sqrtf)         \
  METAL_SHIM_FUNCTION(rsqrt, 1.0f / __builtin_sqrtf) \
  METAL_SHIM_FUNCTION(sin, __builtin_sinf)           \
  METAL_SHIM_FUNCTION(cos, __builtin_cosf)           \
  METAL_SHIM_FUNCTION(tanh, __builtin_tanhf)

METAL_SHIM_FUNCTIONS
METAL_SHIM_FUNCTION(fabs, __builtin_fabsf)
METAL_SHIM_FUNCTION(floor, __builtin_floorf)
METAL_SHIM_FUNCTION(ceil, __builtin_ceilf)
METAL_SHIM_FUNCTION(trunc, __builtin_truncf)
METAL_SHIM_FUNCTION(round, __builtin_roundf)
METAL_SHIM_FUNCTION(rint, __builtin_rintf)

namespace precise {
METAL_SHIM_FUNCTIONS
}  // namespace precise

// Results of the fast functions may be off by some ulp: a seed decides by how many.
namespace fast {
#define METAL_SHIM_FAST(name) \
  inline float name(float x) { return metal_shim_off_by_ulps(metal::name(x)); }
METAL_SHIM_FAST(exp)
METAL_SHIM_FAST(exp2)
METAL_SHIM_FAST(log)
METAL_SHIM_FAST(log2)
METAL_SHIM_FAST(sqrt)
METAL_SHIM_FAST(rsqrt)
METAL_SHIM_FAST(sin)
METAL_SHIM_FAST(cos)
METAL_SHIM_FAST(tanh)
#undef METAL_SHIM_FAST
inline float divide(float x, float y) { return metal_shim_off_by_ulps(x / y); }
}  // namespace fast
#undef METAL_SHIM_FUNCTIONS
#undef METAL_SHIM_FUNCTION

namespace precise {
inline float divide(float x, float y) { return x / y; }
}  // namespace precise

template <class T>
constexpr T min(T a, T b) {
  if constexpr (is_floating_point_v<T>) {
    return a != a ? b : (b < a ? b : a);
  } else {
    return b < a ? b : a;
  }
}
template <class T>
constexpr T max(T a, T b) {
  if constexpr (is_floating_point_v<T>) {
    return a != a ? b : (a < b ? b : a);
  } else {
    return a < b ? b : a;
  }
}
template <class T, int N>
constexpr vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  return metal_shim::each([](T x, T y) { return metal::min(x, y); }, a, b);
}
template <class T, int N>
constexpr vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  return metal_shim::each([](T x, T y) { return metal::max(x, y); }, a, b);
}
inline float fmin(float a, float b) { return metal::min(a, b); }
inline float fmax(float a, float b) { return metal::max(a, b); }
template <class T>
constexpr T clamp(T x, T low, T high) {
  return metal::min(metal::max(x, low), high);
}
template <class T>
constexpr T abs(T x) {
  return x < T(0) ? T(-x) : x == T(0) ? T(0) : x;
}
template <class T, int N>
constexpr vec<T, N> abs(vec<T, N> v) {
  return metal_shim::each([](T x) { return metal::abs(x); }, v);
}
template <class T>
constexpr T sign(T x) {
  return T(x > T(0)) - T(x < T(0));
}
template <class T>
constexpr T select(T a, T b, bool second) {
  return second ? b : a;
}
template <class T, int N>
constexpr vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> second) {
  for (int i = 0; i < N; ++i) a[i] = second[i] ? b[i] : a[i];
  return a;
}
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return half(__builtin_fmaf(a, b, c)); }
template <int N>
inline vec<float, N> fma(vec<float, N> a, vec<float, N> b, vec<float, N> c) {
  for (int i = 0; i < N; ++i) c[i] = fma(a[i], b[i], c[i]);
  return c;
}
inline float fmod(float a, float b) { return __builtin_fmodf(a, b); }
inline float pow(float a, float b) { return __builtin_powf(a, b); }
inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
constexpr bool isinf(float x) { return __builtin_isinf(x); }
constexpr bool isnan(float x) { return __builtin_isnan(x); }
constexpr bool isfinite(float x) { return __builtin_isfinite(x); }
constexpr bool signbit(float x) { return __builtin_bit_cast(uint32_t, x) >> 31; }
template <class T, int N>
constexpr T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum += a[i] * b[i];
  return sum;
}
constexpr uint mulhi(uint a, uint b) { return static_cast<uint>((static_cast<ulong>(a) * b) >> 32); }
constexpr int mulhi(int a, int b) { return static_cast<int>((static_cast<long>(a) * b) >> 32); }
constexpr uint popcount(uint x) { return static_cast<uint>(__builtin_popcount(x)); }
constexpr uint clz(uint x) { return x == 0 ? 32u : static_cast<uint>(__builtin_clz(x)); }
constexpr uint ctz(uint x) { return x == 0 ? 32u : static_cast<uint>(__builtin_ctz(x)); }
constexpr uint rotate(uint x, uint bits) { return (x << (bits & 31u)) | (x >> (-bits & 31u)); }

}  // namespace metal
