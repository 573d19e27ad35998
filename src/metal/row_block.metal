// Rows of an operand of the backward in threadgroup memory, by rows [rows][dims] or in pairs [rows / 2][dims][2].
//
// A lane's two elements of a fragment are neighbours in rows; of a transposed fragment they are neighbours in pairs. The padding
// spreads the rows of a fragment over all banks.
#pragma once

#include "metal/sequence.metal"
#include "metal/tile.metal"

namespace flash_attn {

FA_CONSTANT int threads = FA_SIMDGROUPS * 32;
FA_CONSTANT int run_length = 16 / int(sizeof(FA_T));

/// Fragments of so many head dims that a simdgroup has: FA_SPLIT_D neighbours have a part of them each.
FA_FN constexpr int part_tiles(int dims) { return (fragments(dims) + FA_SPLIT_D - 1) / FA_SPLIT_D; }

FA_FN constexpr int stored_dims(int dims) { return part_tiles(dims) * FA_SPLIT_D * fragment_size; }
FA_FN constexpr int pitch_of(int dims) { return stored_dims(dims) + run_length; }
FA_FN constexpr int pair_pitch_of(int dims) { return 2 * stored_dims(dims) + (fragments(stored_dims(dims)) % 2 == 0 ? 16 : 0); }

FA_CONSTANT int dim_tiles = part_tiles(FA_D);
FA_CONSTANT int value_tiles = part_tiles(FA_DV);
FA_CONSTANT int pitch = pitch_of(FA_D);
FA_CONSTANT int value_pitch = pitch_of(FA_DV);
FA_CONSTANT int pair_pitch = pair_pitch_of(FA_D);
FA_CONSTANT int value_pair_pitch = pair_pitch_of(FA_DV);

using StoredRows = threadgroup FA_T*;
using ConstStoredRows = const threadgroup FA_T*;

using StoredRun = Run<FA_T, run_length>;

/// Of row i of `rows`, from `dim` on; zeros if there is no such row, and past the last head dim.
template <int dims, class Rows>
FA_FN StoredRun run_of_row(Rows rows, int i, int dim) {
  StoredRun run;
  run.fill(FA_T(0.0f));
  if (!rows.has(i)) return run;
  if (dim + run_length <= dims) {
    run.load(rows.row(i) + dim);
  } else {
    run.load_some(rows.row(i) + dim, dims - dim);
  }
  return run;
}

template <int dims, int count, class Rows>
FA_FN void load_rows(StoredRows block, Rows rows, uint thread_index) {
  constexpr int runs = stored_dims(dims) / run_length;
  for (int i = int(thread_index); i < count * runs; i += threads) {
    const int dim = i % runs * run_length;
    run_of_row<dims>(rows, i / runs, dim).store(block + i / runs * pitch_of(dims) + dim);
  }
}

template <int dims, int count, class Rows>
FA_FN void load_pairs(StoredRows block, Rows rows, uint thread_index) {
  constexpr int runs = stored_dims(dims) / run_length;
  for (int i = int(thread_index); i < count / 2 * runs; i += threads) {
    const int pair = i / runs;
    const int dim = i % runs * run_length;
    const StoredRun even = run_of_row<dims>(rows, 2 * pair, dim);
    const StoredRun odd = run_of_row<dims>(rows, 2 * pair + 1, dim);
    Run<FA_T, 2 * run_length> both;
    FA_UNROLL
    for (short j = 0; j < run_length; ++j) {
      both.values[2 * j] = even.values[j];
      both.values[2 * j + 1] = odd.values[j];
    }
    both.store(block + pair * pair_pitch_of(dims) + 2 * dim);
  }
}

// Keys `first` and on, of k or v. NaN may stand in those that are not needed.
template <class Pointer>
struct KeyRows {
  Pointer key_0;
  long stride;
  int first;
  KeyRange needed;

  FA_FN bool has(int i) const thread { return contains(needed, first + i, first + i + 1); }
  FA_FN Pointer row(int i) const thread { return key_0 + (first + i) * stride; }
};

template <class Pointer>
FA_FN KeyRows<Pointer> key_rows(
    Pointer tensor, RowStrides strides, Sequence sequence, int kv_head, int first, KeyRange needed) {
  return {tensor + strides.offset(sequence.cache_row, sequence.k.begin, kv_head), strides.row, first, needed};
}

}  // namespace flash_attn
