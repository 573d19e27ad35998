// How a finding leaves a fiber.
#pragma once

#include <string>

#include "metal_shim.h"

namespace metal_shim {

/// Ends the launch. From a fiber, control goes to run(), which throws; the other fibers are abandoned. `instruction` is an
/// address in the compiled text that says which line it was, or null.
[[noreturn]] void fault(FaultKind, const std::string& message, const void* instruction = nullptr);

}  // namespace metal_shim
