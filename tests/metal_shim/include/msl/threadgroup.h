// Barriers and threadgroup memory.
#pragma once

#include "msl/abi.h"

namespace metal {

enum class mem_flags : uint32_t {
  mem_none = metal_shim::memory_none,
  mem_device = metal_shim::memory_device,
  mem_threadgroup = metal_shim::memory_threadgroup
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint32_t(a) | uint32_t(b)); }

inline void threadgroup_barrier(mem_flags memory, int line = __builtin_LINE()) {
  metal_shim_threadgroup_barrier(uint32_t(memory), line);
}
inline void simdgroup_barrier(mem_flags memory, int line = __builtin_LINE()) {
  metal_shim_simdgroup_barrier(uint32_t(memory), line);
}

}  // namespace metal

namespace metal_shim {

/// `threadgroup T name[N];` becomes `auto& name = threadgroup_array<T[N]>("name");`
template <class Array>
inline Array& threadgroup_array(const char* name, int line = __builtin_LINE()) {
  return *static_cast<Array*>(metal_shim_threadgroup_array(name, sizeof(Array), alignof(Array), line));
}

}  // namespace metal_shim
