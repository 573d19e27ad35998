// The process's AddressSanitizer, for Mode::sanitize: its runtime must be there from the start of the process.
#pragma once

#include <cstddef>
#include <string>

namespace metal_shim::address_sanitizer {

/// Throws where the process runs without it.
void begin_launch();
/// What it reported since begin_launch, or nothing.
std::string end_launch();

void poison(const void* address, std::size_t bytes);
void unpoison(const void* address, std::size_t bytes);

}  // namespace metal_shim::address_sanitizer
