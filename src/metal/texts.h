// The text of a kernel as MLX gets it, from src/metal/*.metal and src/semantics.
//
// A .metal file has its functions first, then a line FA_BODY, then the body of its kernel; one without that line is vocabulary
// for the others. MLX keeps and hashes the text of every launch, so it is made as short as it can be.
#pragma once

#include <string>
#include <string_view>

#include "metal/kernel.h"

namespace flash_attn::metal {

struct Text {
  std::string functions;
  std::string body;  // into which MLX puts a signature
};

/// Without what the kernel does not use. A readable one has the names, lines and #defines that the sources have.
Text text_of(const Kernel& kernel);

/// A file by its path from src: the build embeds them.
std::string_view source_file(std::string_view path);

}  // namespace flash_attn::metal
