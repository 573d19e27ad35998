// The contents of an array of any strides, row after row: a copy that a task on a CPU stream makes.
#pragma once

#include <cstring>

#include "mlx/array.h"

namespace flash_attn {

namespace mx = mlx::core;

class StridedCopy {
 public:
  /// `to` has memory, row-contiguous. Both arrays' memory outlives run().
  StridedCopy(const mx::array& from, mx::array& to)
      : source_(from.data<char>()),
        strides_(from.strides()),
        shape_(from.shape()),
        item_size_(from.itemsize()),
        destination_(to.data<char>()) {}

  void run() { run(0, source_); }

 private:
  void run(std::size_t axis, const char* from) {
    if (axis == shape_.size() || (axis + 1 == shape_.size() && strides_[axis] == 1)) {
      const std::size_t items = axis == shape_.size() ? 1 : static_cast<std::size_t>(shape_[axis]);
      std::memcpy(destination_, from, items * item_size_);
      destination_ += items * item_size_;
      return;
    }
    for (int i = 0; i < shape_[axis]; ++i) {
      run(axis + 1, from + i * strides_[axis] * static_cast<std::int64_t>(item_size_));
    }
  }

  const char* source_;
  mx::Strides strides_;
  mx::Shape shape_;
  std::size_t item_size_;
  char* destination_;
};

}  // namespace flash_attn
