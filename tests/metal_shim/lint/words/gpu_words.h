// Bodies of Metal's words for clang's AMD backend (wave32): one instruction where an Apple GPU has about one.
//
// A matrix product is one opaque instruction on the registers of its fragments.
#pragma once

namespace metal {

#define FA_ONE_INSTRUCTION(name, instruction)      \
  inline float name(float x) {                     \
    float y;                                       \
    asm(instruction " %0, %1" : "=v"(y) : "v"(x)); \
    return y;                                      \
  }                                                \
  inline half name(half x) { return half(name(float(x))); }
#define FA_BODIES                                                     \
  FA_ONE_INSTRUCTION(exp2, "v_exp_f32")                               \
  FA_ONE_INSTRUCTION(log2, "v_log_f32")                               \
  FA_ONE_INSTRUCTION(sqrt, "v_sqrt_f32")                              \
  FA_ONE_INSTRUCTION(rsqrt, "v_rsq_f32")                              \
  FA_ONE_INSTRUCTION(sin, "v_sin_f32")                                \
  FA_ONE_INSTRUCTION(cos, "v_cos_f32")                                \
  FA_ONE_INSTRUCTION(floor, "v_floor_f32")                            \
  FA_ONE_INSTRUCTION(ceil, "v_ceil_f32")                              \
  FA_ONE_INSTRUCTION(rint, "v_rndne_f32")                             \
  FA_ONE_INSTRUCTION(round, "v_rndne_f32")                            \
  FA_ONE_INSTRUCTION(trunc, "v_trunc_f32")                            \
  inline float exp(float x) { return exp2(x * 1.4426950408889634f); } \
  inline float log(float x) { return log2(x) * 0.6931471805599453f; } \
  inline float fabs(float x) { return __builtin_fabsf(x); }           \
  inline float tanh(float x) {                                        \
    const float e = exp2(x * 2.8853900817779268f);                    \
    return (e - 1.0f) / (e + 1.0f);                                   \
  }
FA_BODIES
namespace fast {
FA_BODIES
}
namespace precise {
FA_BODIES
}

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return __builtin_fabsf(x) == __builtin_huge_valf(); }
inline bool isfinite(float x) { return __builtin_fabsf(x) < __builtin_huge_valf(); }

template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
inline T abs(T x) {
  return x < T(0) ? -x : x;
}
template <>
inline float abs(float x) {
  return __builtin_fabsf(x);
}
template <class T>
inline T select(T a, T b, bool condition) {
  return condition ? b : a;
}
template <class T>
inline T mulhi(T a, T b) {
  return T((ulong(a) * b) >> 32);
}
template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; ++i) sum += a[i] * b[i];
  return sum;
}

// A shuffle moves 32 bits.
inline int shuffled(int x, int lane) {
  int y;
  asm volatile("ds_bpermute_b32 %0, %1, %2" : "=v"(y) : "v"(lane), "v"(x));
  return y;
}
template <class T>
inline T simd_shuffle(T x, ushort lane) {
  if constexpr (sizeof(T) < 4) {
    return T(shuffled(int(x), lane));
  } else if constexpr (sizeof(T) == 4) {
    return __builtin_bit_cast(T, shuffled(__builtin_bit_cast(int, x), lane));
  } else {
    struct Parts {
      int part[sizeof(T) / 4];
    } parts = __builtin_bit_cast(Parts, x);
    for (int& part : parts.part) part = shuffled(part, lane);
    return __builtin_bit_cast(T, parts);
  }
}
template <class T>
inline T simd_shuffle_xor(T x, ushort mask) {
  return simd_shuffle(x, ushort(__builtin_amdgcn_workitem_id_x() ^ mask));
}
template <class T>
inline T simd_shuffle_down(T x, ushort by) {
  return simd_shuffle(x, ushort(__builtin_amdgcn_workitem_id_x() + by));
}
template <class T>
inline T simd_shuffle_up(T x, ushort by) {
  return simd_shuffle(x, ushort(__builtin_amdgcn_workitem_id_x() - by));
}
template <class T>
inline T simd_broadcast(T x, ushort lane) {
  return simd_shuffle(x, lane);
}
// Metal has one instruction for each.
template <class T>
inline T uniform(T x) {
  static_assert(sizeof(T) == 4, "a reduction of 32 bits");
  return __builtin_bit_cast(T, __builtin_amdgcn_readfirstlane(__builtin_bit_cast(int, x)));
}
template <class T>
inline T simd_sum(T x) {
  return uniform(x);
}
template <class T>
inline T simd_max(T x) {
  return uniform(x);
}
template <class T>
inline T simd_min(T x) {
  return uniform(x);
}
inline bool simd_any(bool x) { return __builtin_amdgcn_readfirstlane(x); }
inline bool simd_all(bool x) { return __builtin_amdgcn_readfirstlane(x); }

inline void threadgroup_barrier(mem_flags) {
  __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "workgroup");
  __builtin_amdgcn_s_barrier();
}
inline void simdgroup_barrier(mem_flags) { __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "wavefront"); }

template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c) {
  vec<D, 2> sum = c.elements;
  asm("; matrix product %0 %1 %2" : "+v"(sum) : "v"(a.elements), "v"(b.elements));
  d.elements = sum;
}
template <class T, int Columns, int Rows>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T x) {
  return {vec<T, 2>(x)};
}

#undef FA_BODIES
#undef FA_ONE_INSTRUCTION

}  // namespace metal
