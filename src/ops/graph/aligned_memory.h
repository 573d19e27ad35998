// Memory of arrays that begins where kernels like it: MLX's own begins a few bytes after that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "cpu/large_results.h"
#include "mlx/allocator.h"
#include "mlx/array.h"

namespace flash_attn {

/// Gives `array` memory, not initialised, that begins at a multiple of `alignment` bytes: at most 16 KiB, the most that MLX
/// lets an array leave unused when it passes its memory on to the next one. Throws std::bad_alloc.
inline void allocate_at(mx::array& array, std::size_t alignment) {
  auto memory = mx::allocator::malloc(array.nbytes() + alignment);
  if (!memory.buffer().ptr()) throw std::bad_alloc();  // MLX would go on
  array.set_data(std::move(memory));
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(array.data<char>()) % alignment;
  array.copy_shared_buffer(array, array.strides(), array.flags(), array.data_size(),
                           static_cast<std::int64_t>(before / array.itemsize()));
  cpu::prefer_large_pages(array.data<char>(), array.nbytes());
}

}  // namespace flash_attn
