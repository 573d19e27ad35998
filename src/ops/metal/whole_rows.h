// What Metal kernels ask of a tensor: any strides, but a last axis that is contiguous.
#pragma once

#include "mlx/array.h"
#include "mlx/stream.h"

namespace flash_attn {

namespace mx = mlx::core;

/// `array` itself where its strides are known and do; else a node that copies it if, at evaluation, they do not.
mx::array with_whole_rows(const mx::array& array, mx::Stream stream);

}  // namespace flash_attn
