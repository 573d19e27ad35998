// What Mode::hooks knows of every byte: who wrote it, who read it, since which barrier.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metal_shim::hooks {

void begin_launch();
void end_launch();
void begin_threadgroup();
void threadgroup_array(std::size_t offset, std::size_t bytes);
void threadgroup_barrier(std::uint32_t memory);
void simdgroup_barrier(std::uint32_t memory);

}  // namespace metal_shim::hooks
