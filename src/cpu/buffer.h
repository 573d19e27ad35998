// Scratch memory of a pass: float32, aligned to a cache line, not initialised, so that pages nobody touches cost nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace flash_attn::cpu {

struct FreeMemory {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], FreeMemory>;

inline Buffer allocate(std::int64_t size) {
  const std::size_t bytes = (static_cast<std::size_t>(size) * sizeof(float) + 63) / 64 * 64;
  void* memory = bytes ? std::aligned_alloc(64, bytes) : nullptr;
  if (bytes && !memory) throw std::bad_alloc();
  return Buffer(static_cast<float*>(memory));
}

}  // namespace flash_attn::cpu
