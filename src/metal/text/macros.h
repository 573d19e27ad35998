// #defines, used up before a text is sent.
#pragma once

#include "metal/text/tokens.h"

namespace flash_attn::metal {

/// Names of #defines by what they stand for; which themselves go. Long words of the language stay behind a macro.
Tokens with_values(const Tokens& tokens);

}  // namespace flash_attn::metal
