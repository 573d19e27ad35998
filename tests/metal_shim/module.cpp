// Python's face of the shim.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bridge/mlx_bridge.h"
#include "metal_shim.h"
#include "mlx/mlx.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace {

using metal_shim::Mode;
using metal_shim::Report;

Mode mode_from(const std::string& name) {
  if (name == "fast") return Mode::fast;
  if (name == "hooks") return Mode::hooks;
  if (name == "sanitize") return Mode::sanitize;
  throw std::invalid_argument("mode is fast, hooks or sanitize, not " + name);
}

nb::dict dict_of(const Report& report) {
  nb::dict device_read;
  nb::dict device_written;
  for (const auto& [name, bytes] : report.device_bytes) {
    device_read[name.c_str()] = bytes.read;
    device_written[name.c_str()] = bytes.written;
  }
  nb::dict out;
  out["function"] = report.function;
  out["threadgroups"] = report.threadgroups;
  out["matrix_flops"] = report.matrix_flops;
  out["simd_ops"] = report.simd_ops;
  out["barriers"] = report.barriers;
  out["threadgroup_bytes_allocated"] = report.threadgroup_bytes_allocated;
  out["accesses"] = report.accesses;
  out["threadgroup_bytes_read"] = report.threadgroup_bytes.read;
  out["threadgroup_bytes_written"] = report.threadgroup_bytes.written;
  out["device_bytes_read"] = device_read;
  out["device_bytes_written"] = device_written;
  return out;
}

/// A bug for a test to find: in kernels whose name starts so, one piece of text instead of another.
using PlantedBugs = std::map<std::string, std::tuple<std::string, std::string>>;

flash_attn::MetalLaunch with_bugs(flash_attn::MetalLaunch launch, const PlantedBugs& bugs) {
  for (const auto& [kernel, change] : bugs) {
    if (!launch.name.starts_with(kernel)) continue;
    const auto& [right, wrong] = change;
    std::string& text = launch.source.find(right) != std::string::npos ? launch.source : launch.header;
    const std::size_t place = text.find(right);
    if (place == std::string::npos) throw std::invalid_argument(launch.name + " has no '" + right + "'");
    text.replace(place, right.size(), wrong);
  }
  return launch;
}

nb::capsule launcher_capsule(const std::string& mode_name, std::uint64_t seed, const PlantedBugs& bugs) {
  const std::optional<Mode> mode = mode_name == "record" ? std::nullopt : std::optional(mode_from(mode_name));
  auto launcher = std::make_unique<flash_attn::MetalLauncher>([mode, seed, bugs](const flash_attn::MetalLaunch& launch) {
    return metal_shim::launch_on_shim(with_bugs(launch, bugs), mode, seed);
  });
  return nb::capsule(launcher.release(), "flash_attn::MetalLauncher",
                     [](void* p) noexcept { delete static_cast<flash_attn::MetalLauncher*>(p); });
}

using Three = std::tuple<int, int, int>;

std::vector<mx::array> run_kernel(const std::string& name, const nb::dict& inputs, const nb::dict& outputs,
                                  const std::string& source, const std::string& header, Three grid, Three threadgroup,
                                  const std::string& mode, std::uint64_t seed) {
  flash_attn::MetalLaunch launch{
      name, {}, {}, source, header, {}, {}, {}, grid, threadgroup, mx::default_stream(mx::Device(mx::Device::cpu))};
  for (const auto [key, value] : inputs) {
    launch.input_names.push_back(nb::cast<std::string>(key));
    launch.inputs.push_back(nb::cast<mx::array>(value));
  }
  for (const auto [key, value] : outputs) {
    const auto [shape, dtype] = nb::cast<std::tuple<std::vector<int>, mx::Dtype>>(value);
    launch.output_names.push_back(nb::cast<std::string>(key));
    launch.output_shapes.push_back(mx::Shape(shape.begin(), shape.end()));
    launch.output_dtypes.push_back(dtype);
  }
  return metal_shim::launch_on_shim(launch, mode_from(mode), seed);
}

using HostArray = nb::ndarray<nb::numpy, nb::c_contig>;

nb::dict run_text(const std::string& text, const std::string& function,
                  const std::vector<std::tuple<std::string, HostArray, bool>>& buffers, std::array<std::uint32_t, 3> grid,
                  std::array<std::uint32_t, 3> threadgroup, const std::string& mode, std::uint64_t seed) {
  metal_shim::Launch launch{text, function, {}, grid, threadgroup, seed};
  for (const auto& [name, array, writable] : buffers) {
    launch.buffers.push_back({name, const_cast<HostArray&>(array).data(), array.nbytes(), writable});
  }
  return dict_of(metal_shim::run(launch, mode_from(mode)));
}

nb::list report_dicts() {
  nb::list all;
  for (const Report& report : metal_shim::reports()) all.append(dict_of(report));
  return all;
}

}  // namespace

NB_MODULE(metal_shim, module) {
  nb::module_::import_("mlx.core");
  module.doc() = "Runs Metal text on the CPU. A finding of the shim is a RuntimeError whose text starts with its kind.";

  module.def(
      "launcher_capsule", &launcher_capsule, "mode"_a = "hooks", "seed"_a = 0, "bugs"_a = PlantedBugs(),
      "A capsule of the launcher that flash_attn.flash_attn_mlx._core._set_metal_launcher takes. Mode record runs nothing: "
      "texts are recorded, results are zeros. bugs is {start of a kernel's name: (right text, wrong text)}.");
  module.def("run_kernel", &run_kernel, "name"_a, "inputs"_a, "outputs"_a, "source"_a, "header"_a = "", "grid"_a,
             "threadgroup"_a, "mode"_a = "hooks", "seed"_a = 0,
             "As mx.fast.metal_kernel(name, ...)(...): lazy arrays. inputs is {name: array}, outputs {name: (shape, dtype)}.");
  module.def("run_text", &run_text, "text"_a, "function"_a, "buffers"_a, "grid"_a, "threadgroup"_a, "mode"_a = "hooks",
             "seed"_a = 0,
             "Runs a whole text at once, its buffers as [(name, contiguous numpy array, writable)], and returns its report.");
  module.def("transpile", &metal_shim::transpile, "text"_a, "function"_a, "The C++ that the compiler gets.");
  module.def("reports", &report_dicts, "The counters of every run since clear_reports().");
  module.def("clear_reports", &metal_shim::clear_reports);
  module.def("recorded_texts", &metal_shim::recorded_texts, "The texts of the kernels run since clear_texts(), by name.");
  module.def("clear_texts", &metal_shim::clear_texts);
}
