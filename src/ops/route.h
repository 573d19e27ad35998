// Which implementation a call goes to, and why.
#pragma once

#include <string>

#include "flash_attn/attention.h"
#include "ops/call/call.h"

namespace flash_attn {

Route choose_route(const AttentionCall& call, const AttentionOptions& options);

/// ... and the user hears of a call that nobody meant to be slow: it goes to the O(seqlen_q * seqlen_k) reference.
Route take_route(const AttentionCall& call, const AttentionOptions& options);

/// What keeps MLX's SDPA from computing this call with the same meaning; empty: nothing.
std::string why_not_sdpa(const AttentionCall& call, const AttentionOptions& options);

}  // namespace flash_attn
