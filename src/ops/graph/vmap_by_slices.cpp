#include "ops/graph/vmap_by_slices.h"

#include "mlx/ops.h"

namespace flash_attn {
namespace {

using Arrays = std::vector<mx::array>;

/// `inputs` without their mapped axes, at one position along them.
Arrays slice_at(const Arrays& inputs, const std::vector<int>& axes, int position, mx::Stream stream) {
  Arrays slice;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    slice.push_back(axes[i] < 0 ? inputs[i] : mx::take(inputs[i], position, axes[i], stream));
  }
  return slice;
}

/// What slices of `inputs` would look like where there are none.
Arrays imagined_slice(const Arrays& inputs, const std::vector<int>& axes, mx::Stream stream) {
  Arrays slice;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    mx::Shape shape = inputs[i].shape();
    if (axes[i] >= 0) shape.erase(shape.begin() + axes[i]);
    slice.push_back(mx::zeros(shape, inputs[i].dtype(), stream));
  }
  return slice;
}

}  // namespace

std::pair<Arrays, std::vector<int>> vmap_by_slices(const Arrays& inputs, const std::vector<int>& axes, mx::Stream stream,
                                                   const std::function<Arrays(const Arrays&)>& apply) {
  int slices = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (axes[i] >= 0) slices = inputs[i].shape(axes[i]);
  }
  Arrays stacked;
  if (slices == 0) {
    for (const mx::array& output : apply(imagined_slice(inputs, axes, stream))) {
      mx::Shape shape = output.shape();
      shape.insert(shape.begin(), 0);
      stacked.push_back(mx::zeros(shape, output.dtype(), stream));
    }
  } else {
    std::vector<Arrays> columns;
    for (int position = 0; position < slices; ++position) {
      const Arrays outputs = apply(slice_at(inputs, axes, position, stream));
      columns.resize(outputs.size());
      for (std::size_t i = 0; i < outputs.size(); ++i) columns[i].push_back(outputs[i]);
    }
    for (const Arrays& column : columns) stacked.push_back(mx::stack(column, 0, stream));
  }
  std::vector<int> stacked_axes(stacked.size(), 0);
  return {std::move(stacked), std::move(stacked_axes)};
}

}  // namespace flash_attn
