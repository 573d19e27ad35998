#include "ops/metal_launch.h"

#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "flash_attn/attention.h"
#include "mlx/backend/metal/metal.h"
#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "ops/vmap_by_slices.h"

namespace flash_attn {
namespace {

using Arrays = std::vector<mx::array>;

std::vector<mx::array> launch_by_mlx(const MetalLaunch& launch) {
  const auto kernel = mx::fast::metal_kernel(launch.name, launch.input_names, launch.output_names, launch.source, launch.header,
                                             /*ensure_row_contiguous=*/false);
  return kernel(launch.inputs, launch.output_shapes, launch.output_dtypes, launch.grid, launch.threadgroup,
                /*template_args=*/{}, /*init_value=*/std::nullopt, /*verbose=*/false, launch.stream);
}

struct TestLauncher {
  std::mutex mutex;
  MetalLauncher launcher;
  bool probe = false;
};

TestLauncher& test_launcher() {
  static TestLauncher instance;
  return instance;
}

MetalLauncher launcher_of_test() {
  const std::lock_guard lock(test_launcher().mutex);
  return test_launcher().launcher;
}

/// The arguments of launch_metal but for its arrays.
struct Launch {
  metal::Kernel kernel;
  std::vector<mx::Shape> output_shapes;
  std::vector<mx::Dtype> output_dtypes;
  mx::Stream stream;
  MetalVJP vjp;
};

/// A launch as a node of our own. MLX's node of it has no vmap, not even inside custom_function, and its errors name nothing
/// that a caller knows.
class FlashAttentionMetal final : public mx::Primitive {
 public:
  FlashAttentionMetal(Launch launch, std::shared_ptr<mx::Primitive> node)
      : mx::Primitive(launch.stream), launch_(std::move(launch)), node_(std::move(node)) {}

  const char* name() const override { return launch_.kernel.name.c_str(); }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override { node_->eval_cpu(inputs, outputs); }

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override { node_->eval_gpu(inputs, outputs); }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays& outputs) override {
    std::vector<int> without_params;
    for (const int argnum : argnums) without_params.push_back(argnum - 1);
    return launch_.vjp(Arrays(primals.begin() + 1, primals.end()), cotangents, without_params, outputs);
  }

  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override {
    throw NotImplementedError(
        "[flash_attn] flash attention has no jvp (forward-mode derivative); FLASH_ATTENTION_MLX_REF=1 computes with MLX ops "
        "that may have one");
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    return vmap_by_slices(Arrays(inputs.begin() + 1, inputs.end()), std::vector<int>(axes.begin() + 1, axes.end()), stream(),
                          [this](const Arrays& slice) { return launch_on(slice); });
  }

  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    throw NotImplementedError("[flash_attn] on Metal attention cannot be traced with shapeless=True");
  }

 private:
  /// A slice may have any strides; kernels ask for whole rows.
  Arrays launch_on(Arrays slice) {
    for (mx::array& input : slice) input = mx::contiguous(input, false, stream());
    return launch_metal(launch_.kernel, slice, launch_.output_shapes, launch_.output_dtypes, stream(), launch_.vjp);
  }

  Launch launch_;
  std::shared_ptr<mx::Primitive> node_;  // MLX's
};

MetalLaunch metal_launch(const Launch& launch, const Arrays& inputs) {
  const metal::Kernel& kernel = launch.kernel;
  const auto [x, y, z] = kernel.threadgroup;
  const auto [groups_x, groups_y, groups_z] = kernel.threadgroups;
  return {.name = kernel.name,
          .input_names = kernel.inputs,
          .output_names = kernel.outputs,
          .source = kernel.source(),
          .header = kernel.header(),
          .inputs = inputs,
          .output_shapes = launch.output_shapes,
          .output_dtypes = launch.output_dtypes,
          .grid = {groups_x * x, groups_y * y, groups_z * z},
          .threadgroup = {x, y, z},
          .stream = launch.stream};
}

/// MLX's node of a launch knows text and grid, not arrays: one serves every call of the same shape, so that the text is put
/// together once and not in every layer of every step.
class NodesOfMLX {
 public:
  std::shared_ptr<mx::Primitive> find(const std::string& key) const {
    const std::lock_guard lock(mutex_);
    const auto found = nodes_.find(key);
    return found == nodes_.end() ? nullptr : found->second;
  }

  void keep(const std::string& key, std::shared_ptr<mx::Primitive> node) {
    const std::lock_guard lock(mutex_);
    if (nodes_.size() >= most) nodes_.clear();
    nodes_[key] = std::move(node);
  }

 private:
  static constexpr std::size_t most = 256;  // some 40 KB each

  mutable std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<mx::Primitive>> nodes_;
};

std::shared_ptr<mx::Primitive> node_of_mlx(const Launch& launch, const Arrays& inputs) {
  static NodesOfMLX nodes;
  std::ostringstream key;
  key << launch.kernel.name << ' ' << address_spaces(inputs) << ' ' << launch.stream;
  for (const int groups : launch.kernel.threadgroups) key << ' ' << groups;
  std::shared_ptr<mx::Primitive> node = nodes.find(key.str());
  if (node) return node;
  node = launch_by_mlx(metal_launch(launch, inputs)).at(0).primitive_ptr();
  nodes.keep(key.str(), node);
  return node;
}

}  // namespace

void set_metal_launcher(MetalLauncher launcher, bool probe) {
  const std::lock_guard lock(test_launcher().mutex);
  test_launcher().launcher = std::move(launcher);
  test_launcher().probe = probe;
}

bool metal_launches_are_probed() {
  const std::lock_guard lock(test_launcher().mutex);
  return !test_launcher().launcher || test_launcher().probe;
}

bool runs_on_metal(mx::Stream stream) {
  return launcher_of_test() || (stream.device == mx::Device::gpu && mx::metal::is_available());
}

std::string address_spaces(const std::vector<mx::array>& inputs) {
  constexpr std::size_t least_in_device = 8;
  std::string spaces;
  for (const mx::array& input : inputs) spaces += input.size() < least_in_device ? 'c' : 'd';
  return spaces;
}

std::vector<mx::array> launch_metal(const metal::Kernel& kernel, const std::vector<mx::array>& inputs,
                                    const std::vector<mx::Shape>& output_shapes, const std::vector<mx::Dtype>& output_dtypes,
                                    mx::Stream stream, const MetalVJP& vjp) {
  const Launch launch = {kernel, output_shapes, output_dtypes, stream, vjp};
  Arrays with_params = {mx::array(kernel.params.begin(), {static_cast<int>(kernel.params.size())}, mx::int32)};
  with_params.insert(with_params.end(), inputs.begin(), inputs.end());
  const MetalLauncher by_test = launcher_of_test();
  const std::shared_ptr<mx::Primitive> node =
      by_test ? by_test(metal_launch(launch, with_params)).at(0).primitive_ptr() : node_of_mlx(launch, with_params);
  return mx::array::make_arrays(output_shapes, output_dtypes, std::make_shared<FlashAttentionMetal>(launch, node), with_params);
}

}  // namespace flash_attn
