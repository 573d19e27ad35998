// Rows of an operand of the backward in threadgroup memory, [rows][dims]; products read them as they are or transposed.
#pragma once

#include "metal/sequence.metal"
#include "metal/tile.metal"

namespace flash_attn {

constant constexpr int threads = FA_SIMDGROUPS * 32;
constant constexpr int run_length = 16 / int(sizeof(FA_T));

/// Fragments of so many head dims that a simdgroup has: with FA_SPLIT_D 2, neighbours have half of them each.
METAL_FUNC constexpr int part_tiles(int dims) { return (fragments(dims) + FA_SPLIT_D - 1) / FA_SPLIT_D; }

/// Elements of a stored row: whole fragments, then padding that spreads the rows of a fragment over all banks.
METAL_FUNC constexpr int stored_dims(int dims) { return part_tiles(dims) * FA_SPLIT_D * fragment_size; }
METAL_FUNC constexpr int pitch_of(int dims) { return stored_dims(dims) + run_length; }

constant constexpr int dim_tiles = part_tiles(FA_D);
constant constexpr int value_tiles = part_tiles(FA_DV);
constant constexpr int pitch = pitch_of(FA_D);
constant constexpr int value_pitch = pitch_of(FA_DV);

using StoredRows = threadgroup FA_T*;
using ConstStoredRows = const threadgroup FA_T*;

/// Rows 0 to count of `rows`; zeros in those that it has not, and past the last head dim.
template <int dims, int count, class Rows>
METAL_FUNC void load_rows(StoredRows block, Rows rows, uint thread_index) {
  constexpr int runs = stored_dims(dims) / run_length;
  for (int i = int(thread_index); i < count * runs; i += threads) {
    const int row = i / runs;
    const int dim = i % runs * run_length;
    Run<FA_T, run_length> run;
    run.fill(FA_T(0.0f));
    if (rows.has(row)) {
      if (dim + run_length <= dims) {
        run.load(rows.row(row) + dim);
      } else {
        run.load_some(rows.row(row) + dim, dims - dim);
      }
    }
    run.store(block + row * pitch_of(dims) + dim);
  }
}

// Keys `first` and on, of k or v. NaN may stand in those that are not needed.
template <class Pointer>
struct KeyRows {
  Pointer key_0;
  long stride;
  int first;
  KeyRange needed;

  METAL_FUNC bool has(int i) const thread { return contains(needed, first + i, first + i + 1); }
  METAL_FUNC Pointer row(int i) const thread { return key_0 + (first + i) * stride; }
};

template <class Pointer>
METAL_FUNC KeyRows<Pointer> key_rows(
    Pointer tensor, RowStrides strides, Sequence sequence, int kv_head, int first, KeyRange needed) {
  return {tensor + strides.offset(sequence.cache_row, sequence.k.begin, kv_head), strides.row, first, needed};
}

}  // namespace flash_attn
