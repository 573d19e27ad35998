// Large memory pages for large results.
#pragma once

#include <cstddef>

namespace flash_attn::cpu {

/// For memory that is about to be written for the first time: from 4 MiB on, asks the kernel for pages of 2 MiB, as NumPy does.
/// A result that malloc takes from the system then costs one page fault where it cost 512. Only advice, on Linux.
void prefer_large_pages(void* memory, std::size_t bytes);

}  // namespace flash_attn::cpu
