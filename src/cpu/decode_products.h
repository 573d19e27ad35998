// What decode does in the numbers of a cache. The loop around it (decode_kernel.h) exists once, and products are compiled once
// for each dtype and each way to read ahead, whatever they are combined with.
#pragma once

#include "cpu/decode_state.h"
#include "cpu/key_walk.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Of whole blocks of keys, so that the call costs nothing.
struct DecodeProducts {
  int keys_of_block;
  // q of a panel's rows, whose first is the unit's row `row`, to `state`.
  void (*read_queries)(const DecodePass& pass, const Unit& unit, const RowPanel& panel, int row, DecodeState& state);
  // S = K Q^T
  void (*score_block)(const DecodePass& pass, const Unit& unit, const KeySlots& keys, DecodeState& state);
  // O = alpha O + P V. `next`: the block whose keys are read after these values.
  void (*value_block)(const DecodePass& pass, const Unit& unit, const KeySlots& keys, const KeySlots& next, DecodeState& state);
  // A row of O, summed up as rows of V are read, in its own order.
  void (*order_dims)(float* o, int dim);
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
