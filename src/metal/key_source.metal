// Where each key of a sequence lies in k and v (plain strides, a row of a cache, pages), and what stands there: numbers or codes.
//
//   const auto keys = keys_of(params, sequence, block_table);
//   const auto K = key_tensor<FA_K_CODES, FA_D>(k, k_strides, k_scales, k_scales_strides, k_biases, k_biases_strides);
//   const KeySlot slot = keys.slot(key);  // of a key of the sequence: one look-up
//   if (slot.exists()) K.run(slot, kv_head, d)
#pragma once

#include "metal/sequence.metal"
#include "metal/tile.metal"
#include "semantics/paging.h"
#include "semantics/quantization.h"

#ifndef FA_PAGED
#define block_table flash_attn::Absent()
#endif
#ifndef FA_K_CODES
#define FA_K_CODES 0
#endif
#ifndef FA_V_CODES
#define FA_V_CODES 0
#endif
#if FA_K_CODES == 0
#define k_scales flash_attn::Absent()
#define k_scales_strides flash_attn::Absent()
#endif
#if FA_K_CODES < 2
#define k_biases flash_attn::Absent()
#define k_biases_strides flash_attn::Absent()
#endif
#if FA_V_CODES == 0
#define v_scales flash_attn::Absent()
#define v_scales_strides flash_attn::Absent()
#endif
#if FA_V_CODES < 2
#define v_biases flash_attn::Absent()
#define v_biases_strides flash_attn::Absent()
#endif

namespace flash_attn {

// ---- where

// Along the first two axes of k and v.
struct KeySlot {
  int row;  // batch item, row of the cache, or page; negative: a page that does not exist, whose keys are invisible
  int index;

  FA_FN bool exists() const thread { return row >= 0; }
};

struct KeysOfRow {
  int row;
  int begin;  // slot of key 0

  FA_FN KeySlot slot(int key) const thread { return {row, begin + key}; }
  FA_FN KeySlot slot_near(KeySlot first, int, int i) const thread { return {row, first.index + i}; }
};

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

FA_FN KeysOfRow keys_of(const device int*, Sequence sequence, Absent) {
  return {sequence.cache_row, sequence.k.begin};
}

template <class Table>
FA_FN KeysOfPages<Table> keys_of(const device int* params, Sequence sequence, Table table) {
  const long row = sequence.cache_row;
  return {table + row * params[param_table_blocks], sequence.k.begin, params[param_page_size], params[param_cache_rows]};
}

// ---- what

FA_CONSTANT short key_run = 8;        // elements of a row that are read together
FA_CONSTANT short affine_group = 64;  // codes that share a scale and a bias

FA_FN RowStrides key_strides(Absent) { return {0, 0, 0}; }
/// From group to group of a row's codes.
template <int codes, class Strides>
FA_FN long group_stride(Strides strides) {
  if constexpr (codes > 1) return strides[3];
  return 0;
}

// k or v: numbers, or codes of int8 (1) or of MLX's quantised form with 8 (2) or 4 (3) bits. What codes stand for is not rounded.
template <int codes>
using KeyElement = metal::conditional_t<codes == 0, FA_T, float>;

template <int codes, int dims, class Data, class Scales, class Biases>
struct KeyTensor {
  Data data;
  RowStrides strides;
  Scales scales;
  RowStrides scale_strides;
  long scale_group;
  Biases biases;
  RowStrides bias_strides;
  long bias_group;

  /// Elements from d, a multiple of 8, on; past the row's end they are 0.
  FA_FN Run<KeyElement<codes>, key_run> run(KeySlot slot, int head, int d) const thread {
    const Data row = data + strides.offset(slot.row, slot.index, head);
    Run<KeyElement<codes>, key_run> x;
    x.fill(0.0f);
    if constexpr (codes == 0) {
      if (d + key_run <= dims) {
        x.load(row + d);
      } else {
        x.load_some(row + d, dims - d);
      }
    } else if (d < dims) {
      const float scale = float(scales[scale_strides.offset(slot.row, slot.index, head) + d / affine_group * scale_group]);
      if constexpr (codes == 1) {
        x.load_some(row + d, dims - d);
        FA_UNROLL
        for (short i = 0; i < key_run; ++i) x.values[i] *= scale;
      } else {
        constexpr short bits = codes == 2 ? 8 : 4;
        constexpr short codes_of_word = 32 / bits;
        const float bias = float(biases[bias_strides.offset(slot.row, slot.index, head) + d / affine_group * bias_group]);
        FA_UNROLL
        for (short i = 0; i < key_run; ++i) {
          const uint word = row[d / codes_of_word + i / codes_of_word];
          const uint code = word >> uint(i % codes_of_word * bits) & ((1u << uint(bits)) - 1u);
          x.values[i] = dequantized(float(code), scale, bias);
        }
      }
    }
    return x;
  }
};

template <int codes, int dims, class Data, class Strides, class Scales, class ScaleStrides, class Biases, class BiasStrides>
FA_FN KeyTensor<codes, dims, Data, Scales, Biases> key_tensor(
    Data data, Strides strides, Scales scales, ScaleStrides scale_strides, Biases biases, BiasStrides bias_strides) {
  return {
      data,   key_strides(strides),      scales, key_strides(scale_strides), group_stride<codes>(scale_strides),
      biases, key_strides(bias_strides), group_stride<codes>(bias_strides)};
}

}  // namespace flash_attn
