// half and bfloat: arithmetic rounds to the type after every operation, as Metal's does.
#pragma once

#include "msl/words.h"

namespace metal_shim {

#if defined(__clang__)
using HalfBits = __fp16;
#else
using HalfBits = _Float16;
#endif

template <class T>
inline constexpr bool is_integer = __is_same(T, bool) || __is_same(T, char) || __is_same(T, signed char) ||
                                   __is_same(T, unsigned char) || __is_same(T, short) || __is_same(T, unsigned short) ||
                                   __is_same(T, int) || __is_same(T, unsigned) || __is_same(T, long) ||
                                   __is_same(T, unsigned long) || __is_same(T, long long) || __is_same(T, unsigned long long);

template <class T>
inline constexpr bool is_number = is_integer<T> || __is_same(T, float);

}  // namespace metal_shim

struct half {
  metal_shim::HalfBits value;

  half() = default;
  template <class T>
  requires metal_shim::is_number<T>
  constexpr half(T x) : value(static_cast<metal_shim::HalfBits>(static_cast<float>(x))) {}
  METAL_SHIM_INLINE operator float() const { return static_cast<float>(value); }
};

struct bfloat {
  uint16_t bits;

  bfloat() = default;
  // Explicit: text that Apple's compiler rejects must not pass here.
  template <class T>
  requires metal_shim::is_number<T>
  constexpr explicit bfloat(T x) : bits(rounded(static_cast<float>(x))) {}
  constexpr explicit bfloat(half x) : bits(rounded(x)) {}
  METAL_SHIM_INLINE operator float() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

  static constexpr uint16_t rounded(float x) {
    const uint32_t all = __builtin_bit_cast(uint32_t, x);
    if (x != x) return static_cast<uint16_t>((all >> 16) | 0x40u);
    return static_cast<uint16_t>((all + 0x7FFFu + ((all >> 16) & 1u)) >> 16);  // to nearest, ties to even
  }
};

// With its own type and with integers a 16-bit float stays what it is; with float it becomes float.
#define METAL_SHIM_ARITHMETIC(Type, op)                                                                       \
  constexpr Type operator op(Type a, Type b) { return Type(static_cast<float>(a) op static_cast<float>(b)); } \
  constexpr Type& operator op##=(Type& a, Type b) { return a = a op b; }                                      \
  constexpr float operator op(Type a, float b) { return static_cast<float>(a) op b; }                         \
  constexpr float operator op(float a, Type b) { return a op static_cast<float>(b); }                         \
  template <class T>                                                                                          \
  requires metal_shim::is_integer<T>                                                                          \
  constexpr Type operator op(Type a, T b) { return a op Type(b); }                                            \
  template <class T>                                                                                          \
  requires metal_shim::is_integer<T>                                                                          \
  constexpr Type operator op(T a, Type b) { return Type(a) op b; }
#define METAL_SHIM_COMPARISON(Type, op)                                                                 \
  constexpr bool operator op(Type a, Type b) { return static_cast<float>(a) op static_cast<float>(b); } \
  template <class T>                                                                                    \
  requires metal_shim::is_number<T>                                                                     \
  constexpr bool operator op(Type a, T b) { return static_cast<float>(a) op static_cast<float>(b); }    \
  template <class T>                                                                                    \
  requires metal_shim::is_number<T>                                                                     \
  constexpr bool operator op(T a, Type b) { return static_cast<float>(a) op static_cast<float>(b); }
#define METAL_SHIM_FLOAT16(Type)                                            \
  METAL_SHIM_ARITHMETIC(Type, +)                                            \
  METAL_SHIM_ARITHMETIC(Type, -)                                            \
  METAL_SHIM_ARITHMETIC(Type, *)                                            \
  METAL_SHIM_ARITHMETIC(Type, /)                                            \
  METAL_SHIM_COMPARISON(Type, ==)                                           \
  METAL_SHIM_COMPARISON(Type, !=)                                           \
  METAL_SHIM_COMPARISON(Type, <)                                            \
  METAL_SHIM_COMPARISON(Type, >)                                            \
  METAL_SHIM_COMPARISON(Type, <=)                                           \
  METAL_SHIM_COMPARISON(Type, >=)                                           \
  constexpr Type operator-(Type a) { return Type(-static_cast<float>(a)); } \
  constexpr Type operator+(Type a) { return a; }

METAL_SHIM_FLOAT16(half)
METAL_SHIM_FLOAT16(bfloat)

#undef METAL_SHIM_FLOAT16
#undef METAL_SHIM_COMPARISON
#undef METAL_SHIM_ARITHMETIC
