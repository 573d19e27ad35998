// vec<T, N> and its packed form. Conversions between element types are explicit, as in Metal; swizzles are x y z w xy zw xyz.
#pragma once

#include "msl/scalar.h"

namespace metal {

template <class T, int N>
struct vec;

// With METAL_SHIM_CHECKED copies are functions: UBSan looks at the addresses that functions get, not at trivial copies.
#if defined(METAL_SHIM_CHECKED)
#define METAL_SHIM_COPIES(from_v, set_from_v)      \
  METAL_SHIM_INLINE vec(const vec& v) : from_v {}  \
  METAL_SHIM_INLINE vec& operator=(const vec& v) { \
    set_from_v;                                    \
    return *this;                                  \
  }
#else
#define METAL_SHIM_COPIES(from_v, set_from_v)
#endif
#define METAL_SHIM_LIST(...) __VA_ARGS__

template <class T>
struct alignas(sizeof(T)) vec<T, 1> {
  T x;
  vec() = default;
  constexpr vec(T a) : x(a) {}
  constexpr T& operator[](int i) { return (&x)[i]; }
  constexpr const T& operator[](int i) const { return (&x)[i]; }
};

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    T data[2];
  };
  vec() = default;
  METAL_SHIM_COPIES(METAL_SHIM_LIST(x(v.x), y(v.y)), METAL_SHIM_LIST(x = v.x, y = v.y))
  constexpr vec(T a) : x(a), y(a) {}
  constexpr vec(T a, T b) : x(a), y(b) {}
  template <class U>
  constexpr explicit vec(const vec<U, 2>& v) : x(T(v.x)), y(T(v.y)) {}
  constexpr T& operator[](int i) { return data[i]; }
  constexpr const T& operator[](int i) const { return data[i]; }
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    struct {
      T x, y, z;
    };
    struct {
      vec<T, 2> xy;
    };
    T data[3];
  };
  vec() = default;
  METAL_SHIM_COPIES(METAL_SHIM_LIST(x(v.x), y(v.y), z(v.z)), METAL_SHIM_LIST(x = v.x, y = v.y, z = v.z))
  constexpr vec(T a) : x(a), y(a), z(a) {}
  constexpr vec(T a, T b, T c) : x(a), y(b), z(c) {}
  constexpr vec(vec<T, 2> ab, T c) : x(ab.x), y(ab.y), z(c) {}
  template <class U>
  constexpr explicit vec(const vec<U, 3>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)) {}
  constexpr T& operator[](int i) { return data[i]; }
  constexpr const T& operator[](int i) const { return data[i]; }
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    struct {
      T x, y, z, w;
    };
    struct {
      vec<T, 2> xy, zw;
    };
    struct {
      vec<T, 3> xyz;
    };
    T data[4];
  };
  vec() = default;
  METAL_SHIM_COPIES(METAL_SHIM_LIST(x(v.x), y(v.y), z(v.z), w(v.w)), METAL_SHIM_LIST(x = v.x, y = v.y, z = v.z, w = v.w))
  constexpr vec(T a) : x(a), y(a), z(a), w(a) {}
  constexpr vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  constexpr vec(vec<T, 2> ab, vec<T, 2> cd) : x(ab.x), y(ab.y), z(cd.x), w(cd.y) {}
  constexpr vec(vec<T, 3> abc, T d) : x(abc.x), y(abc.y), z(abc.z), w(d) {}
  template <class U>
  constexpr explicit vec(const vec<U, 4>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  constexpr T& operator[](int i) { return data[i]; }
  constexpr const T& operator[](int i) const { return data[i]; }
};

#undef METAL_SHIM_COPIES
#undef METAL_SHIM_LIST

}  // namespace metal

namespace metal_shim {

template <class T>
struct Same {
  using type = T;
};
template <class T>
using same = typename Same<T>::type;  // not deduced: scalars take the vector's element type

template <class T, int N, class F>
constexpr auto each(F f, const metal::vec<T, N>& a) {
  metal::vec<decltype(f(a[0])), N> out;
  for (int i = 0; i < N; ++i) out[i] = f(a[i]);
  return out;
}
template <class T, int N, class F>
constexpr auto each(F f, const metal::vec<T, N>& a, const metal::vec<T, N>& b) {
  metal::vec<decltype(f(a[0], b[0])), N> out;
  for (int i = 0; i < N; ++i) out[i] = f(a[i], b[i]);
  return out;
}

/// A packed vector: the alignment of its element.
template <class T, int N>
struct packed_vec {
  T data[N];
  packed_vec() = default;
  constexpr packed_vec(const metal::vec<T, N>& v) {
    for (int i = 0; i < N; ++i) data[i] = v[i];
  }
  METAL_SHIM_INLINE operator metal::vec<T, N>() const {
    metal::vec<T, N> v;
    for (int i = 0; i < N; ++i) v[i] = data[i];
    return v;
  }
  constexpr T& operator[](int i) { return data[i]; }
  constexpr const T& operator[](int i) const { return data[i]; }
};

}  // namespace metal_shim

namespace metal {

#define METAL_SHIM_VEC_OPERATOR(op)                                            \
  template <class T, int N>                                                    \
  constexpr vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {    \
    return metal_shim::each([](T x, T y) { return T(x op y); }, a, b);         \
  }                                                                            \
  template <class T, int N>                                                    \
  constexpr vec<T, N> operator op(const vec<T, N>& a, metal_shim::same<T> b) { \
    return a op vec<T, N>(b);                                                  \
  }                                                                            \
  template <class T, int N>                                                    \
  constexpr vec<T, N> operator op(metal_shim::same<T> a, const vec<T, N>& b) { \
    return vec<T, N>(a) op b;                                                  \
  }                                                                            \
  template <class T, int N>                                                    \
  constexpr vec<T, N>& operator op##=(vec<T, N>& a, const vec<T, N>& b) {      \
    return a = a op b;                                                         \
  }                                                                            \
  template <class T, int N>                                                    \
  constexpr vec<T, N>& operator op##=(vec<T, N>& a, metal_shim::same<T> b) {   \
    return a = a op vec<T, N>(b);                                              \
  }
METAL_SHIM_VEC_OPERATOR(+)
METAL_SHIM_VEC_OPERATOR(-)
METAL_SHIM_VEC_OPERATOR(*)
METAL_SHIM_VEC_OPERATOR(/)
METAL_SHIM_VEC_OPERATOR(%)
METAL_SHIM_VEC_OPERATOR(&)
METAL_SHIM_VEC_OPERATOR(|)
METAL_SHIM_VEC_OPERATOR(^)
METAL_SHIM_VEC_OPERATOR(<<)
METAL_SHIM_VEC_OPERATOR(>>)
#undef METAL_SHIM_VEC_OPERATOR

#define METAL_SHIM_VEC_COMPARISON(op)                                             \
  template <class T, int N>                                                       \
  constexpr vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {    \
    return metal_shim::each([](T x, T y) { return x op y; }, a, b);               \
  }                                                                               \
  template <class T, int N>                                                       \
  constexpr vec<bool, N> operator op(const vec<T, N>& a, metal_shim::same<T> b) { \
    return a op vec<T, N>(b);                                                     \
  }
METAL_SHIM_VEC_COMPARISON(==)
METAL_SHIM_VEC_COMPARISON(!=)
METAL_SHIM_VEC_COMPARISON(<)
METAL_SHIM_VEC_COMPARISON(>)
METAL_SHIM_VEC_COMPARISON(<=)
METAL_SHIM_VEC_COMPARISON(>=)
#undef METAL_SHIM_VEC_COMPARISON

template <class T, int N>
constexpr vec<T, N> operator-(const vec<T, N>& a) {
  return metal_shim::each([](T x) { return T(-x); }, a);
}
template <class T, int N>
constexpr vec<T, N> operator~(const vec<T, N>& a) {
  return metal_shim::each([](T x) { return T(~x); }, a);
}

template <int N>
constexpr bool any(const vec<bool, N>& a) {
  bool found = false;
  for (int i = 0; i < N; ++i) found |= a[i];
  return found;
}
template <int N>
constexpr bool all(const vec<bool, N>& a) {
  bool every = true;
  for (int i = 0; i < N; ++i) every &= a[i];
  return every;
}

}  // namespace metal

#define METAL_SHIM_VECTORS(T)                         \
  using T##2 = metal::vec<T, 2>;                      \
  using T##3 = metal::vec<T, 3>;                      \
  using T##4 = metal::vec<T, 4>;                      \
  using packed_##T##2 = metal_shim::packed_vec<T, 2>; \
  using packed_##T##3 = metal_shim::packed_vec<T, 3>; \
  using packed_##T##4 = metal_shim::packed_vec<T, 4>;
METAL_SHIM_VECTORS(char)
METAL_SHIM_VECTORS(uchar)
METAL_SHIM_VECTORS(short)
METAL_SHIM_VECTORS(ushort)
METAL_SHIM_VECTORS(int)
METAL_SHIM_VECTORS(uint)
METAL_SHIM_VECTORS(long)
METAL_SHIM_VECTORS(ulong)
METAL_SHIM_VECTORS(half)
METAL_SHIM_VECTORS(bfloat)
METAL_SHIM_VECTORS(float)
#undef METAL_SHIM_VECTORS
using bool2 = metal::vec<bool, 2>;
using bool3 = metal::vec<bool, 3>;
using bool4 = metal::vec<bool, 4>;
