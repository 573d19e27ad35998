// Between MLX and the shim: what mx::fast::metal_kernel would send to Apple's compiler, run on the CPU as part of the graph.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "metal_shim.h"
#include "ops/metal/launch.h"

namespace metal_shim {

/// Arrays whose evaluation records the launch's text and runs it under the shim, or without a mode gives zeros. A Fault becomes
/// the exception of the evaluation.
std::vector<mlx::core::array> launch_on_shim(const flash_attn::MetalLaunch&, std::optional<Mode>, std::uint64_t seed);

/// Of all runs since the last clear_reports, in order.
std::vector<Report> reports();
void clear_reports();
void add_report(Report);

/// The texts recorded since the last clear_texts, by the kernel's name.
std::map<std::string, std::string> recorded_texts();
void clear_texts();

}  // namespace metal_shim
