// MLX's dtypes as the kernels name them. Arrays are checked before.
#pragma once

#include <stdexcept>

#include "ops/call/call.h"

namespace flash_attn {

inline DType dtype_of(const mx::array& array) {
  switch (array.dtype().val()) {
    case mx::Dtype::Val::float32:
      return DType::float32;
    case mx::Dtype::Val::bfloat16:
      return DType::bfloat16;
    case mx::Dtype::Val::float16:
      return DType::float16;
    case mx::Dtype::Val::bool_:
      return DType::boolean;
    case mx::Dtype::Val::int8:
      return DType::int8;
    case mx::Dtype::Val::uint32:  // of MLX's quantised triple; its shape says how many bits a code has
      return DType::affine8;
    default:
      throw std::logic_error("[flash_attn] a dtype that no kernel takes");
  }
}

}  // namespace flash_attn
