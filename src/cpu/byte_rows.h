// Rows of a quantised cache as bytes, for products that take them as they lie, and what sums over them become.
#pragma once

#include "cpu/integer_operand.h"
#include "cpu/key_walk.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// The rows of a step, as they lie. Those of a page that does not exist are another's: their scores are masked, so that they
// weigh 0, and no byte times 0 is other than 0.
template <class Later>
class ByteRows {
 public:
  FA_INLINE ByteRows(const auto& block, int step, int head, Along along)
      : places_(block.source, block.keys, step, block.first_head + head), step_(places_.bytes_to_next(along)) {}
  FA_INLINE void next() { offset_ += step_; }

  FA_INLINE const char* at(int row) const { return places_.of_first_head[row] + offset_; }
  FA_INLINE Bytes load(int row, int d) const { return load_bytes(at(row) + d); }
  FA_INLINE void ask(int row, int byte) const { __builtin_prefetch(at(row) + byte); }
  FA_INLINE Bytes load_tail(int row, int d, int count) const { return load_bytes(RowTail(at(row) + d, count, 1).bytes); }

 private:
  RowPlaces<Later> places_;
  std::int64_t step_;
  std::int64_t offset_ = 0;
};

template <DType dtype>
struct BlockBytes {
  static constexpr DType row_dtype = dtype;
  template <class Later>
  using StepRows = ByteRows<Later>;

  const KeyTensor& source;
  const KeySlots& keys;
  std::int32_t first_head;
};

// O of a block in integers, and where it goes: the first step of a block begins with zeros, the last adds them to O.
struct BlockSums {
  std::int32_t* sums;  // [row][dim], in the order of an operand's words, as O
  float* o;
  std::int64_t stride;
  const float* rescale;    // of O, each row
  const float* row_units;  // of the sums
  bool is_first;
  bool is_last;
};

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
