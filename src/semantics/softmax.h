// Online softmax of a row in base 2 (FlashAttention-2, algorithm 1): scores arrive multiplied by log2(e), the state is float32.
#pragma once

#include "semantics/portable.h"

namespace flash_attn {

FA_CONSTANT float log2_e = 1.4426950408889634f;
FA_CONSTANT float ln_2 = 0.6931471805599453f;

// The running maximum before any key. Finite, so that a masked score minus it is -inf and never NaN; the lowest float, so that
// an additive mask of "the lowest float" still weighs its keys alike, as softmax does.
FA_CONSTANT float lowest_score = -3.4028234663852886e38f;

}  // namespace flash_attn
