// #include and #if, resolved before a text is sent: what a call does not use is not in it.
#pragma once

#include <functional>
#include <string_view>

#include "metal/text/tokens.h"

namespace flash_attn::metal {

/// The text of a file by its path from src, as #include "..." names it.
using SourceFiles = std::function<std::string_view(std::string_view path)>;

/// What a Metal compiler sees of a file, each that it includes once and in its place, after the lines `defines`. #defines of
/// the files stay where they are.
Tokens resolved(std::string_view path, std::string_view defines, const SourceFiles& files);

}  // namespace flash_attn::metal
