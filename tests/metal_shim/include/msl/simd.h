// Operations of a simdgroup. A default argument takes the line of the caller, by which the runtime knows divergence.
#pragma once

#include "msl/abi.h"
#include "msl/math.h"

namespace metal_shim {

template <class T>
inline T shuffled(T value, uint32_t source, const char* name, int line) {
  static_assert(sizeof(T) <= largest_exchange);
  T result;
  metal_shim_shuffle(&value, &result, sizeof(T), source, name, line);
  return result;
}

/// In a tree, as hardware does it; every lane gets the result.
template <class T, class Combine>
inline void reduce_slots(void* slots, uint32_t lanes) {
  T values[lanes_per_simdgroup];
  for (uint32_t i = 0; i < lanes; ++i) values[i] = *reinterpret_cast<T*>(static_cast<char*>(slots) + i * largest_exchange);
  for (uint32_t step = 1; step < lanes; step *= 2) {
    for (uint32_t i = 0; i + step < lanes; i += 2 * step) values[i] = Combine::of(values[i], values[i + step]);
  }
  for (uint32_t i = 0; i < lanes; ++i) *reinterpret_cast<T*>(static_cast<char*>(slots) + i * largest_exchange) = values[0];
}

/// Lane i gets the combination of lanes 0 to i, or to i - 1 where it is exclusive.
template <class T, class Combine, bool exclusive>
inline void scan_slots(void* slots, uint32_t lanes) {
  T sum = T(0);
  for (uint32_t i = 0; i < lanes; ++i) {
    T& value = *reinterpret_cast<T*>(static_cast<char*>(slots) + i * largest_exchange);
    const T next = i == 0 ? value : Combine::of(sum, value);
    value = exclusive ? sum : next;
    sum = next;
  }
}

template <class T>
inline T reduced(T value, Reduction reduction, const char* name, int line) {
  static_assert(sizeof(T) <= largest_exchange);
  T result;
  metal_shim_reduce(&value, &result, sizeof(T), reduction, name, line);
  return result;
}

struct Sum {
  template <class T>
  static T of(T a, T b) {
    return a + b;
  }
};
struct Product {
  template <class T>
  static T of(T a, T b) {
    return a * b;
  }
};
struct Min {
  template <class T>
  static T of(T a, T b) {
    return metal::min(a, b);
  }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    return metal::max(a, b);
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return T(a & b);
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return T(a | b);
  }
};

}  // namespace metal_shim

extern "C" uint32_t metal_shim_lane();

namespace metal {

template <class T>
inline T simd_shuffle(T x, ushort lane, int line = __builtin_LINE()) {
  return metal_shim::shuffled(x, lane, "simd_shuffle", line);
}
template <class T>
inline T simd_broadcast(T x, ushort lane, int line = __builtin_LINE()) {
  return metal_shim::shuffled(x, lane, "simd_broadcast", line);
}
template <class T>
inline T simd_broadcast_first(T x, int line = __builtin_LINE()) {
  return metal_shim::shuffled(x, 0, "simd_broadcast_first", line);
}
template <class T>
inline T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  return metal_shim::shuffled(x, metal_shim_lane() ^ mask, "simd_shuffle_xor", line);
}
template <class T>
inline T simd_shuffle_down(T x, ushort delta, int line = __builtin_LINE()) {
  const uint32_t from = metal_shim_lane() + delta;
  return metal_shim::shuffled(x, from < 32u ? from : metal_shim::no_lane, "simd_shuffle_down", line);
}
template <class T>
inline T simd_shuffle_up(T x, ushort delta, int line = __builtin_LINE()) {
  const uint32_t lane = metal_shim_lane();
  return metal_shim::shuffled(x, lane >= delta ? lane - delta : metal_shim::no_lane, "simd_shuffle_up", line);
}

#define METAL_SHIM_REDUCTION(name, Combine)                                                       \
  template <class T>                                                                              \
  inline T name(T x, int line = __builtin_LINE()) {                                               \
    return metal_shim::reduced(x, metal_shim::reduce_slots<T, metal_shim::Combine>, #name, line); \
  }
METAL_SHIM_REDUCTION(simd_sum, Sum)
METAL_SHIM_REDUCTION(simd_product, Product)
METAL_SHIM_REDUCTION(simd_min, Min)
METAL_SHIM_REDUCTION(simd_max, Max)
METAL_SHIM_REDUCTION(simd_and, And)
METAL_SHIM_REDUCTION(simd_or, Or)
#undef METAL_SHIM_REDUCTION

template <class T>
inline T simd_prefix_inclusive_sum(T x, int line = __builtin_LINE()) {
  return metal_shim::reduced(x, metal_shim::scan_slots<T, metal_shim::Sum, false>, "simd_prefix_inclusive_sum", line);
}
template <class T>
inline T simd_prefix_exclusive_sum(T x, int line = __builtin_LINE()) {
  return metal_shim::reduced(x, metal_shim::scan_slots<T, metal_shim::Sum, true>, "simd_prefix_exclusive_sum", line);
}
inline bool simd_all(bool x, int line = __builtin_LINE()) {
  return metal_shim::reduced(x, metal_shim::reduce_slots<bool, metal_shim::And>, "simd_all", line);
}
inline bool simd_any(bool x, int line = __builtin_LINE()) {
  return metal_shim::reduced(x, metal_shim::reduce_slots<bool, metal_shim::Or>, "simd_any", line);
}

}  // namespace metal
