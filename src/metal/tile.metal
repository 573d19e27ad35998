// The vocabulary of the Metal kernels: 8 x 8 fragments of simdgroup_matrix, of which a lane holds two neighbours in one row.
//
// Only thread_elements is used, never simdgroup_load: a fragment is then any eight rows and columns that pointers can reach.
#pragma once

#include "semantics/portable.h"

#define FA_UNROLL _Pragma("clang loop unroll(full)")

namespace flash_attn {

FA_CONSTANT short fragment_size = 8;

/// Fragments that cover so many rows or columns.
FA_FN constexpr int fragments(int size) { return (size + fragment_size - 1) / fragment_size; }

/// The two elements of an 8 x 8 fragment that this lane holds: (row, column) and (row, column + 1).
template <class T>
using Fragment = vec<T, 2>;

struct LanePlace {
  short row;
  short column;
};

/// The layout of A, B and C of simdgroup_matrix alike.
FA_FN LanePlace place_of_lane(uint lane) {
  const short quad = short(lane) / 4;
  return {short((quad & 4) + (short(lane) / 2) % 4), short((quad & 2) * 2 + (short(lane) % 2) * 2)};
}

/// Eight rows of a matrix.
template <int columns, class T = float>
struct Tile {
  Fragment<T> fragment[columns];  // `columns` counts fragments

  FA_FN void fill(float x) thread {
    FA_UNROLL
    for (short i = 0; i < columns; ++i) fragment[i] = Fragment<T>(T(x));
  }

  /// Each row by its own factor: a lane's elements are all of one row.
  FA_FN void scale_rows(T factor) thread {
    FA_UNROLL
    for (short i = 0; i < columns; ++i) fragment[i] *= factor;
  }
};

/// Neighbours in memory, moved one by one: the compiler joins them as far as their alignment allows.
template <class T, int count>
struct Run {
  T values[count];

  FA_FN void fill(float x) thread {
    FA_UNROLL
    for (short i = 0; i < count; ++i) values[i] = T(x);
  }

  template <class Pointer>
  FA_FN void load(Pointer from) thread {
    FA_UNROLL
    for (short i = 0; i < count; ++i) values[i] = T(from[i]);
  }

  /// The first `available` of them.
  template <class Pointer>
  FA_FN void load_some(Pointer from, int available) thread {
    FA_UNROLL
    for (short i = 0; i < count; ++i) {
      if (i < available) values[i] = T(from[i]);
    }
  }

  template <class Pointer>
  FA_FN void store(Pointer to) const thread {
    FA_UNROLL
    for (short i = 0; i < count; ++i) to[i] = values[i];
  }
};

/// D += A B of three fragments. Products of 16 bits are exact in float32, in which all is added up.
template <class A, class B>
FA_FN void multiply_accumulate(thread Fragment<float>& d, Fragment<A> a, Fragment<B> b) {
  simdgroup_matrix<A, 8, 8> matrix_a;
  simdgroup_matrix<B, 8, 8> matrix_b;
  simdgroup_matrix<float, 8, 8> matrix_d;
  reinterpret_cast<thread Fragment<A>&>(matrix_a.thread_elements()) = a;
  reinterpret_cast<thread Fragment<B>&>(matrix_b.thread_elements()) = b;
  reinterpret_cast<thread Fragment<float>&>(matrix_d.thread_elements()) = d;
  simdgroup_multiply_accumulate(matrix_d, matrix_a, matrix_b, matrix_d);
  d = reinterpret_cast<thread Fragment<float>&>(matrix_d.thread_elements());
}

/// This lane's part of a fragment whose first element is at `first`; a transposed one has its strides swapped.
template <class T, class Pointer>
FA_FN Fragment<T> load_fragment(Pointer first, LanePlace place, int row_stride, int column_stride) {
  first += place.row * row_stride + place.column * column_stride;
  return Fragment<T>(T(first[0]), T(first[column_stride]));
}

/// This lane's row of a tile: head dims from `first` on, zeros past the last.
template <int columns, class T, class Pointer>
FA_FN void load_row(thread Tile<columns, T>& tile, Pointer row, int first, int dims, LanePlace place) {
  FA_UNROLL
  for (short d = 0; d < columns; ++d) {
    const int dim = first + d * fragment_size + place.column;
    tile.fragment[d] = Fragment<T>(dim < dims ? row[dim] : T(0.0f), dim + 1 < dims ? row[dim + 1] : T(0.0f));
  }
}

template <class T, int columns, class Pointer>
FA_FN void store_row(Pointer row, thread const Tile<columns>& tile, int first, int dims, LanePlace place) {
  FA_UNROLL
  for (short d = 0; d < columns; ++d) {
    FA_UNROLL
    for (short i = 0; i < 2; ++i) {
      const int dim = first + d * fragment_size + place.column + i;
      if (dim < dims) row[dim] = T(tile.fragment[d][i]);
    }
  }
}

/// Over the lanes that share a row of a fragment.
FA_FN float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, 1));
  return max(x, simd_shuffle_xor(x, 8));
}

FA_FN float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}

/// One lane of each row, for what is written once a row.
FA_FN bool is_first_of_row(uint lane) { return (lane & 9u) == 0u; }

}  // namespace flash_attn
