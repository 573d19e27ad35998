// Text to a function, by way of g++ or clang, kept by the hash of all that it depends on.
#pragma once

#include "metal_shim.h"
#include "scheduler.h"

namespace metal_shim {

Kernel compile(const Launch&, Mode);

/// The line of the text that an instruction of its compiled form comes from, "name.metal:12", or nothing.
std::string line_of(const void* instruction, const Launch&, Mode);

}  // namespace metal_shim
