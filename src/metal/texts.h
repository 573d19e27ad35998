// The kernels' texts, which the build takes from src/metal/*.metal: includes flattened, comments and blank lines dropped.
#pragma once

#include <string_view>

namespace flash_attn::metal {

struct Text {
  std::string_view functions;
  std::string_view body;
};

/// Of src/metal/<kernel>.metal.
const Text& text_of(std::string_view kernel);

}  // namespace flash_attn::metal
