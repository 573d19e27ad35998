// What Mode::hooks knows of every byte of threadgroup memory and of the outputs: who wrote it, who read it, since which
// barrier.
//
// The compiler's instrumentation for ThreadSanitizer calls one function before every access of the text; this is another
// implementation of those functions, and of UBSan's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "metal_shim.h"

namespace metal_shim::hooks {

void begin_launch(const std::vector<Buffer>&, void* const* addresses);
/// Checks that every byte of the outputs was written, and adds the counters to the report.
void end_launch(Report&);
void begin_threadgroup();
void threadgroup_array(std::size_t offset, std::size_t bytes);
void threadgroup_barrier(std::uint32_t memory);
void simdgroup_barrier(std::uint32_t memory);

}  // namespace metal_shim::hooks
