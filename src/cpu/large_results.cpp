#include "cpu/large_results.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdint>
#endif

namespace flash_attn::cpu {

bool is_large(std::size_t bytes) { return bytes >= std::size_t{4} << 20; }

#if defined(__linux__)

void prefer_large_pages(void* memory, std::size_t bytes) {
  constexpr std::size_t page = 4096;
  if (!is_large(bytes)) return;
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t begin = (address + page - 1) / page * page;
  const std::uintptr_t end = (address + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

#else

void prefer_large_pages(void*, std::size_t) {}

#endif

}  // namespace flash_attn::cpu
