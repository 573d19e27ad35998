// simdgroup_matrix by its thread elements. There is no simdgroup_load or simdgroup_store: MLX ships none, and text that mixes
// them with coordinates of its own depends on the layout. No diagonal constructor either.
#pragma once

#include "msl/abi.h"
#include "msl/vec.h"

namespace metal {

template <class T, int rows, int columns>
struct simdgroup_matrix {
  static_assert(rows == 8 && columns == 8);
  static_assert(__is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat));

  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }

 private:
  vec<T, 2> elements;
};

template <class T, int rows, int columns>
inline simdgroup_matrix<T, rows, columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, rows, columns> m;
  m.thread_elements() = vec<T, 2>(value);
  return m;
}

template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c,
                                          int line = __builtin_LINE()) {
  const float a_elements[2] = {float(a.thread_elements().x), float(a.thread_elements().y)};
  const float b_elements[2] = {float(b.thread_elements().x), float(b.thread_elements().y)};
  const float c_elements[2] = {float(c.thread_elements().x), float(c.thread_elements().y)};
  float d_elements[2];
  metal_shim_multiply_accumulate(a_elements, b_elements, c_elements, d_elements, line);
  d.thread_elements() = vec<D, 2>(D(d_elements[0]), D(d_elements[1]));
}

template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
                               int line = __builtin_LINE()) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f), line);
}

using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

}  // namespace metal
