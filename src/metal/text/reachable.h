// Only what a kernel uses, directly or through what it uses, goes into its text.
#pragma once

#include "metal/text/tokens.h"

namespace flash_attn::metal {

/// Of declarations in namespaces, those that `body` mentions or that these mention; members of a struct likewise, if they are
/// functions. All that is left is in one namespace. A name stands for everything that bears it.
Tokens reachable(const Tokens& declarations, const Tokens& body);

}  // namespace flash_attn::metal
