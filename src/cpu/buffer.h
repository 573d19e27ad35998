// Scratch memory of a pass: float32, aligned to a cache line, not initialised.
#pragma once

#include <cstdint>
#include <memory>

namespace flash_attn::cpu {

struct ReleaseBuffer {
  std::size_t bytes = 0;
  void operator()(float* memory) const;
};
using Buffer = std::unique_ptr<float[], ReleaseBuffer>;

/// Memory of an earlier pass where some is left over: fresh pages cost a short call a tenth of its time. At most 96 MiB are
/// kept. Throws std::bad_alloc.
Buffer allocate(std::int64_t floats);

}  // namespace flash_attn::cpu
