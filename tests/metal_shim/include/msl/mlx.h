// What MLX puts before every text that it compiles (its metal::utils()), as far as kernels may use it.
#pragma once

#include "msl/metal.h"

using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;

template <class T>
struct Limits;
template <class T>
requires metal_shim::is_integer<T>
struct Limits<T> {
  static constexpr T max = metal::numeric_limits<T>::max();
  static constexpr T min = metal::numeric_limits<T>::min();
  static constexpr T finite_max = max;
  static constexpr T finite_min = min;
};
template <class T>
requires metal::is_floating_point_v<T>
struct Limits<T> {
  static constexpr T max = metal::numeric_limits<T>::infinity();
  static constexpr T min = T(-metal::numeric_limits<T>::infinity());
  static constexpr T finite_max = metal::numeric_limits<T>::max();
  static constexpr T finite_min = T(-metal::numeric_limits<T>::max());
};
