#include "mlx_bridge.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/export.h"
#include "mlx/fast.h"
#include "mlx/fast_primitives.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"

namespace metal_shim {

namespace mx = mlx::core;
using flash_attn::MetalLaunch;

namespace {

struct Books {
  std::mutex mutex;
  std::vector<Report> reports;
  std::map<std::string, std::string> texts;
};

Books& books() {
  static Books all;
  return all;
}

/// What MLX's CustomKernel would be given on a Mac.
struct Recording {
  std::string function;
  std::string text;
  std::vector<std::tuple<bool, bool, bool>> shape_infos;  // of each input: its shape, strides, ndim are arguments too
};

/// MLX builds a CustomKernel without a GPU only where a function is exported. The text depends on shapes and types alone.
Recording record(const MetalLaunch& launch, const std::vector<mx::array>& inputs) {
  Recording recording;
  const auto trace = [&](const mx::Args& tracers) {
    const auto kernel =
        mx::fast::metal_kernel(launch.name, launch.input_names, launch.output_names, launch.source, launch.header,
                               /*ensure_row_contiguous=*/false);
    std::vector<mx::array> outputs = kernel(tracers, launch.output_shapes, launch.output_dtypes, launch.grid,
                                            launch.threadgroup, {}, std::nullopt, false, mx::Device(mx::Device::gpu));
    const auto state = static_cast<mx::fast::CustomKernel&>(outputs.at(0).primitive()).state();
    recording = {std::get<0>(state), std::get<1>(state), std::get<4>(state)};
    return outputs;
  };
  mx::Args shapes;
  for (const mx::array& input : inputs) shapes.push_back(mx::zeros(input.shape(), input.dtype()));
  mx::export_function([](const mx::ExportCallbackInput&) {}, trace, shapes);
  return recording;
}

/// The bytes that an array's strides reach, from its first element in both directions.
Buffer reach_of(const std::string& name, const mx::array& x) {
  std::int64_t low = 0;
  std::int64_t high = 0;
  for (int axis = 0; axis < static_cast<int>(x.ndim()); ++axis) {
    const std::int64_t last = (x.shape(axis) - 1) * x.strides()[axis];
    (last < 0 ? low : high) += last;
  }
  const std::size_t item = x.itemsize();
  if (x.size() == 0) return {name, nullptr, 0, false};
  char* const first = const_cast<char*>(x.data<char>());
  const std::size_t offset = static_cast<std::size_t>(first - static_cast<const char*>(x.buffer().raw_ptr()));
  return {name, first, (high + 1) * item, false, static_cast<std::size_t>(-low) * item, offset};
}

std::array<std::uint32_t, 3> three(const std::tuple<int, int, int>& t) {
  return {static_cast<std::uint32_t>(std::get<0>(t)), static_cast<std::uint32_t>(std::get<1>(t)),
          static_cast<std::uint32_t>(std::get<2>(t))};
}

/// Buffers in the order in which CustomKernel::eval_gpu sets them.
Report run_launch(const MetalLaunch& launch, const Recording& recording, const std::vector<mx::array>& inputs,
                  std::vector<mx::array>& outputs, Mode mode, std::uint64_t seed) {
  std::vector<int> ndims(inputs.size());
  Launch run_this{recording.text, recording.function, {}, three(launch.grid), three(launch.threadgroup), seed};
  const auto add = [&](const std::string& name, const void* data, std::size_t bytes) {
    run_this.buffers.push_back({name, const_cast<void*>(data), bytes, false});
  };
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const mx::array& x = inputs[i];
    const std::string& name = launch.input_names[i];
    run_this.buffers.push_back(reach_of(name, x));
    if (x.ndim() == 0) continue;
    const auto [shape, strides, ndim] = recording.shape_infos[i];
    ndims[i] = static_cast<int>(x.ndim());
    if (shape) add(name + "_shape", x.shape().data(), x.ndim() * sizeof(x.shape()[0]));
    if (strides) add(name + "_strides", x.strides().data(), x.ndim() * sizeof(x.strides()[0]));
    if (ndim) add(name + "_ndim", &ndims[i], sizeof(int));
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    run_this.buffers.push_back({launch.output_names[i], outputs[i].data<char>(), outputs[i].nbytes(), true});
  }
  return run(run_this, mode);
}

class ShimKernel : public mx::Primitive {
 public:
  ShimKernel(mx::Stream stream, MetalLaunch launch, std::optional<Mode> mode, std::uint64_t seed)
      : Primitive(stream), launch_(std::move(launch)), mode_(mode), seed_(seed) {
    launch_.inputs.clear();  // the graph has them
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const Recording recording = record(launch_, inputs);
    {
      const std::lock_guard<std::mutex> lock(books().mutex);
      books().texts[launch_.name] = recording.text;
    }
    for (mx::array& output : outputs) output.set_data(mx::allocator::malloc(output.nbytes()));
    if (!mode_) {
      for (mx::array& output : outputs) std::memset(output.data<char>(), 0, output.nbytes());
      return;
    }
    prepare(recording.text, recording.function, *mode_);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [launch = launch_, mode = *mode_, seed = seed_, recording, inputs, outputs]() mutable {
          add_report(run_launch(launch, recording, inputs, outputs, mode, seed));
        });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("the shim runs on the CPU");
  }

  DEFINE_NAME(ShimKernel)
  bool is_equivalent(const mx::Primitive& other) const override { return this == &other; }

 private:
  MetalLaunch launch_;
  std::optional<Mode> mode_;
  std::uint64_t seed_;
};

}  // namespace

std::vector<mx::array> launch_on_shim(const MetalLaunch& launch, std::optional<Mode> mode, std::uint64_t seed) {
  const mx::Stream stream = mx::default_stream(mx::Device(mx::Device::cpu));
  return mx::array::make_arrays(launch.output_shapes, launch.output_dtypes,
                                std::make_shared<ShimKernel>(stream, launch, mode, seed), launch.inputs);
}

std::vector<Report> reports() {
  const std::lock_guard<std::mutex> lock(books().mutex);
  return books().reports;
}

void clear_reports() {
  const std::lock_guard<std::mutex> lock(books().mutex);
  books().reports.clear();
}

void add_report(Report report) {
  const std::lock_guard<std::mutex> lock(books().mutex);
  books().reports.push_back(std::move(report));
}

std::map<std::string, std::string> recorded_texts() {
  const std::lock_guard<std::mutex> lock(books().mutex);
  return books().texts;
}

void clear_texts() {
  const std::lock_guard<std::mutex> lock(books().mutex);
  books().texts.clear();
}

}  // namespace metal_shim
