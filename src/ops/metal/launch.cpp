#include "ops/metal/launch.h"

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <utility>

#include "flash_attn/attention.h"
#include "metal/texts.h"
#include "mlx/backend/metal/metal.h"
#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "ops/graph/vmap_by_slices.h"

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

  DEFINE_NAME(FlashAttentionMetal)

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

  /// Of equal inputs, params among them: mx.compile then merges equal calls.
  bool is_equivalent(const mx::Primitive& other) const override {
    const Launch& theirs = static_cast<const FlashAttentionMetal&>(other).launch_;
    return launch_.kernel.name == theirs.kernel.name && launch_.kernel.threadgroups == theirs.kernel.threadgroups;
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

/// What calls share. Forgets all when it is full.
template <class Key, class Value>
class Cache {
 public:
  explicit Cache(std::size_t most) : most_(most) {}

  template <class Make>
  Value get(const Key& key, Make make) {
    {
      const std::lock_guard lock(mutex_);
      if (const auto found = values_.find(key); found != values_.end()) return found->second;
    }
    Value value = make();
    const std::lock_guard lock(mutex_);
    if (values_.size() >= most_) values_.clear();
    values_.insert_or_assign(key, value);
    return value;
  }

 private:
  const std::size_t most_;
  std::mutex mutex_;
  std::map<Key, Value> values_;
};

std::shared_ptr<const metal::Text> kept_text(const metal::Kernel& kernel) {
  static Cache<std::string, std::shared_ptr<const metal::Text>> cache(256);
  return cache.get(kernel.name, [&] { return std::make_shared<const metal::Text>(metal::text_of(kernel)); });
}

MetalLaunch metal_launch(const Launch& launch, const Arrays& inputs) {
  const metal::Kernel& kernel = launch.kernel;
  const auto text = kept_text(kernel);
  const auto [x, y, z] = kernel.threadgroup;
  const auto [groups_x, groups_y, groups_z] = kernel.threadgroups;
  return {.name = kernel.name,
          .input_names = kernel.inputs,
          .output_names = kernel.outputs,
          .source = text->body,
          .header = text->functions,
          .inputs = inputs,
          .output_shapes = launch.output_shapes,
          .output_dtypes = launch.output_dtypes,
          .grid = {groups_x * x, groups_y * y, groups_z * z},
          .threadgroup = {x, y, z},
          .stream = launch.stream};
}

mx::array params_of(const metal::Kernel& kernel) {
  static Cache<std::vector<std::int32_t>, mx::array> cache(1024);
  return cache.get(kernel.params,
                   [&] { return mx::array(kernel.params.begin(), {static_cast<int>(kernel.params.size())}, mx::int32); });
}

/// MLX's node of a launch knows text and grid, not arrays: one serves every call of the same shape, so that MLX puts
/// its text together once and not in every layer of every step.
std::shared_ptr<mx::Primitive> node_of_mlx(const Launch& launch, const Arrays& inputs) {
  static Cache<std::string, std::shared_ptr<mx::Primitive>> cache(256);
  std::ostringstream key;
  key << launch.kernel.name << ' ' << address_spaces(inputs) << ' ' << launch.stream;
  for (const int groups : launch.kernel.threadgroups) key << ' ' << groups;
  return cache.get(key.str(), [&] { return launch_by_mlx(metal_launch(launch, inputs)).at(0).primitive_ptr(); });
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
  Arrays with_params = {params_of(kernel)};
  with_params.insert(with_params.end(), inputs.begin(), inputs.end());
  const MetalLauncher by_test = launcher_of_test();
  const std::shared_ptr<mx::Primitive> node =
      by_test ? by_test(metal_launch(launch, with_params)).at(0).primitive_ptr() : node_of_mlx(launch, with_params);
  return mx::array::make_arrays(output_shapes, output_dtypes, std::make_shared<FlashAttentionMetal>(launch, node), with_params);
}

}  // namespace flash_attn
