// Where each key of a sequence lies in k and v (plain strides, a row of a cache, pages), and what stands there: numbers, or codes.
//
//   const auto keys = keys_of(params, sequence, block_table);
//   const auto K = key_tensor<FA_D>(k, k_strides);
//   const KeySlot slot = keys.slot(key);  // of a key of the sequence: one look-up
//   if (slot.exists()) K.run(slot, kv_head, d)
#pragma once

#include "metal/sequence.metal"
#include "metal/tile.metal"
#include "semantics/paging.h"

namespace flash_attn {

// ---- where

// Along the first two axes of k and v.
struct KeySlot {
  int row;  // batch item, row of the cache, or page; negative: a page that does not exist, whose keys are invisible
  int index;

  FA_FN bool exists() const thread { return row >= 0; }
};

#ifdef FA_PAGED
template <class Table>
struct KeysOfPages {
  Table pages;  // the sequence's row of the table
  int begin;
  int page_size;
  int page_count;

  FA_FN KeySlot slot(int key) const thread {
    const PageSlot place = page_slot(begin + key, page_size);
    const int page = pages[place.entry];
    return {page_exists(page, page_count) ? page : -1, place.row};
  }

  /// Of key + i, i < 8, where `first` is that of `key` and begin + key a multiple of 8: mostly in the same page.
  FA_FN KeySlot slot_near(KeySlot first, int key, int i) const thread {
    return page_size % 8 == 0 ? KeySlot{first.row, first.index + i} : slot(key + i);
  }
};

template <class Table>
FA_FN KeysOfPages<Table> keys_of(Params params, Sequence sequence, Table table) {
  const long row = sequence.cache_row;
  return {table + row * params[param_table_blocks], sequence.k.begin, params[param_page_size], params[param_cache_rows]};
}
#else
struct KeysOfRow {
  int row;
  int begin;  // slot of key 0

  FA_FN KeySlot slot(int key) const thread { return {row, begin + key}; }
  FA_FN KeySlot slot_near(KeySlot first, int, int i) const thread { return {row, first.index + i}; }
};

FA_FN KeysOfRow keys_of(Params, Sequence sequence, Absent) {
  return {sequence.cache_row, sequence.k.begin};
}
#endif

// ---- what

FA_CONSTANT short key_run = 8;  // elements of a row that are read together

#ifdef FA_K_CODES
using KeyElement = float;  // what codes stand for is not rounded
#else
using KeyElement = FA_T;

template <int dims, class Data>
struct KeyTensor {
  Data data;
  RowStrides strides;

  /// Elements from d, a multiple of 8, on; past the row's end they are 0.
  FA_FN Run<KeyElement, key_run> run(KeySlot slot, int head, int d) const thread {
    const Data row = data + strides.offset(slot.row, slot.index, head) + d;
    Run<KeyElement, key_run> x;
    if (d + key_run <= dims) {
      x.load(row);
    } else {
      x.fill(0.0f);
      x.load_some(row, dims - d);
    }
    return x;
  }
};

template <int dims, class Data>
FA_FN KeyTensor<dims, Data> key_tensor(Data data, Strides strides) {
  return {data, key_strides(strides)};
}
#endif

}  // namespace flash_attn

#ifdef FA_K_CODES
#include "metal/quantised_keys.metal"
#endif
