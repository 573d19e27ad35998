#include "hooks.h"

namespace metal_shim::hooks {
void begin_launch() {}
void end_launch() {}
void begin_threadgroup() {}
void threadgroup_array(std::size_t, std::size_t) {}
void threadgroup_barrier(std::uint32_t) {}
void simdgroup_barrier(std::uint32_t) {}
}  // namespace metal_shim::hooks
