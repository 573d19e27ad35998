// What a result is given that is larger than a core's caches: large pages, and stores that go past the caches.
#pragma once

#include <cstddef>

namespace flash_attn::cpu {

/// From 4 MiB on. Kernels write such a result past the caches (Tensor::streamed): most of it would be gone from there before
/// anybody reads it, and a line that is written as a whole need not be read first.
bool is_large(std::size_t bytes);

/// For large memory that is about to be written for the first time: asks the kernel for pages of 2 MiB, as NumPy does. What
/// malloc takes from the system then costs one page fault where it cost 512. Only advice, on Linux.
void prefer_large_pages(void* memory, std::size_t bytes);

}  // namespace flash_attn::cpu
