#include "ops/metal/whole_rows.h"

#include <memory>
#include <utility>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "ops/call/require.h"
#include "ops/graph/strided_copy.h"

namespace flash_attn {
namespace {

using Arrays = std::vector<mx::array>;

bool has_whole_rows(const mx::array& array) { return array.strides(-1) == 1 || array.shape(-1) == 1; }

class WholeRows final : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  DEFINE_NAME(FlashAttentionWholeRows)

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    if (has_whole_rows(inputs[0])) return outputs[0].copy_shared_buffer(inputs[0]);
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch([copy = StridedCopy(inputs[0], outputs[0])]() mutable { copy.run(); });
  }

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    if (has_whole_rows(inputs[0])) return outputs[0].copy_shared_buffer(inputs[0]);
    mx::contiguous(inputs[0], false, stream()).primitive().eval_gpu(inputs, outputs);
  }

  Arrays vjp(const Arrays&, const Arrays& cotangents, const std::vector<int>&, const Arrays&) override { return cotangents; }

  Arrays jvp(const Arrays&, const Arrays& tangents, const std::vector<int>&) override { return tangents; }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    return {{with_whole_rows(inputs[0], stream())}, axes};
  }

  bool is_equivalent(const mx::Primitive&) const override { return true; }

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }
};

}  // namespace

mx::array with_whole_rows(const mx::array& array, mx::Stream stream) {
  if (is_ready(array) && has_whole_rows(array)) return array;
  return mx::array(array.shape(), array.dtype(), std::make_shared<WholeRows>(stream), {array});
}

}  // namespace flash_attn
