// Names of a letter or two for everything that is ours in a text.
#pragma once

#include <string_view>
#include <unordered_set>

#include "metal/text/tokens.h"

namespace flash_attn::metal {

/// Whether a name is a word of Metal, of MLX or of C++.
bool is_foreign(std::string_view name);

/// By the name as written: the more often one is used, the shorter. Foreign ones and `kept` stay what they are.
Names short_names(const Tokens& text, const std::unordered_set<std::string_view>& kept);

}  // namespace flash_attn::metal
