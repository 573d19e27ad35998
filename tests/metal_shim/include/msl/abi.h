// What a compiled text and the runtime say to each other. The runtime includes this file too.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace metal_shim {

/// Where a thread stands: what Metal passes to a kernel by attributes.
struct Thread {
  uint32_t threadgroup_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t thread_position_in_grid[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t threads_per_grid[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
  uint32_t threads_per_simdgroup;
  void* const* buffers;
};

/// What the lanes of a simdgroup do together. All must arrive with the same, from the same line.
enum class Op : uint8_t { shuffle, reduce, multiply_accumulate, simdgroup_barrier, threadgroup_barrier };

/// Memory that a barrier makes visible, as mem_flags.
constexpr uint32_t memory_none = 0;
constexpr uint32_t memory_device = 1;
constexpr uint32_t memory_threadgroup = 2;

constexpr uint32_t lanes_per_simdgroup = 32;
constexpr uint32_t largest_exchange = 16;  // bytes a lane may give to a simdgroup operation
constexpr uint32_t no_lane = ~0u;          // a shuffle from no lane gives poison

/// Reduces the lanes' values, each in a slot of `largest_exchange` bytes, in place.
using Reduction = void (*)(void* slots, uint32_t lanes);

}  // namespace metal_shim

extern "C" {

void metal_shim_shuffle(const void* value, void* result, uint32_t bytes, uint32_t source_lane, const char* name, int line);
void metal_shim_reduce(const void* value, void* result, uint32_t bytes, metal_shim::Reduction, const char* name, int line);
/// D = A B + C, of which this lane holds two neighbours each.
void metal_shim_multiply_accumulate(const float a[2], const float b[2], const float c[2], float d[2], int line);
void metal_shim_simdgroup_barrier(uint32_t memory, int line);
void metal_shim_threadgroup_barrier(uint32_t memory, int line);
/// The threadgroup's one array of this name and line.
void* metal_shim_threadgroup_array(const char* name, size_t bytes, size_t alignment, int line);

/// 0: the fast functions are exact.
extern uint32_t metal_shim_ulp_seed;
}

/// A fast function's result, wrong by up to two units in the last place. 0, 1, infinities and NaN stay.
inline float metal_shim_off_by_ulps(float x) {
  if (metal_shim_ulp_seed == 0) return x;
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t exponent = (bits >> 23) & 255u;
  if (exponent < 2u || exponent > 253u || x == 1.0f) return x;
  const uint32_t hash = (bits ^ metal_shim_ulp_seed) * 0x9E3779B1u;
  return __builtin_bit_cast(float, bits + (hash >> 16) % 5u - 2u);
}
