// vmap of any function of arrays: apply it to each slice, stack the results. So dropout, lengths and masks mean for every slice
// what they mean without vmap.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace flash_attn {

namespace mx = mlx::core;

/// `axes`: the mapped axis of each input, negative where it is not mapped.
std::pair<std::vector<mx::array>, std::vector<int>> vmap_by_slices(
    const std::vector<mx::array>& inputs, const std::vector<int>& axes, mx::Stream stream,
    const std::function<std::vector<mx::array>(const std::vector<mx::array>&)>& apply);

}  // namespace flash_attn
