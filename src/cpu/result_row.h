// A finished row to the caller's array, past the caches where the whole result would not stay there.
#pragma once

#include "cpu/convert.h"
#include "cpu/kernels.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Whole lines only: half a line that goes past the caches costs more than one that is read first.
inline bool streams_row(const Tensor& tensor, const char* destination, int n) {
  return tensor.streamed && tensor.strides.dim == 1 && n * size_of(tensor.dtype) % cache_line == 0 &&
         reinterpret_cast<std::uintptr_t>(destination) % cache_line == 0;
}

// Of a row that streams_row said yes to.
inline void stream_row(DType dtype, char* destination, int n, const float* row) {
  for (int i = 0; i < n; i += lanes, destination += lanes * size_of(dtype)) {
    switch (dtype) {
      case DType::bfloat16:
        stream(destination, to_bfloat16(load(row + i)));
        break;
      case DType::float16:
        stream(destination, to_float16(load(row + i)));
        break;
      default:
        stream(destination, load(row + i));
        break;
    }
  }
}

// Element `offset` and the n - 1 after it = row [n]. Who streams many rows ends with streams_end.
inline void write_result_row(const Tensor& tensor, std::int64_t offset, int n, const float* row) {
  char* destination = element(tensor.data, tensor.dtype, offset);
  if (streams_row(tensor, destination, n)) {
    stream_row(tensor.dtype, destination, n, row);
  } else {
    write_row(tensor.dtype, destination, tensor.strides.dim, n, row);
  }
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
