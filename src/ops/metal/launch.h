// From a metal::Kernel to a node of MLX's graph.
#pragma once

#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "metal/kernel.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace flash_attn {

namespace mx = mlx::core;

/// What mlx::core::fast::metal_kernel and its result take.
struct MetalLaunch {
  std::string name;
  std::vector<std::string> input_names, output_names;
  std::string source, header;
  std::vector<mx::array> inputs;
  std::vector<mx::Shape> output_shapes;
  std::vector<mx::Dtype> output_dtypes;
  std::tuple<int, int, int> grid, threadgroup;  // in threads
  mx::Stream stream;
};

/// Gives the outputs, as arrays of one primitive whose inputs are those of the launch.
using MetalLauncher = std::function<std::vector<mx::array>(const MetalLaunch&)>;

/// For tests: kernels go to `launcher` instead of MLX, on any stream and without a GPU. An empty one undoes it. `probe`:
/// kernels are tried before they are used, as on a GPU.
void set_metal_launcher(MetalLauncher launcher, bool probe = false);

/// Whether attention on this stream is computed by the Metal kernels.
bool runs_on_metal(mx::Stream stream);

bool metal_launches_are_probed();

/// Which arrays MLX passes as `constant` (c) and which as `device` (d): that is part of a text.
std::string address_spaces(const std::vector<mx::array>& inputs);

/// The gradients of a launch with respect to inputs[argnums]. Arrays are those of the launch, without params.
using MetalVJP =
    std::function<std::vector<mx::array>(const std::vector<mx::array>& inputs, const std::vector<mx::array>& cotangents,
                                         const std::vector<int>& argnums, const std::vector<mx::array>& outputs)>;

/// The outputs of `kernel`, lazily. `inputs` are in the order of kernel.inputs, without params.
std::vector<mx::array> launch_metal(const metal::Kernel& kernel, const std::vector<mx::array>& inputs,
                                    const std::vector<mx::Shape>& output_shapes, const std::vector<mx::Dtype>& output_dtypes,
                                    mx::Stream stream, const MetalVJP& vjp);

}  // namespace flash_attn
