// The order of a score: s = scale * q.k; softcap; ALiBi; mask; then softmax.
//
// T is float, or a backend's vector of floats, whose words then come with it.
#pragma once

#include "semantics/portable.h"

namespace flash_attn {

/// tanh(s / softcap), from which the capped score is softcap * this (Gemma 2).
template <class T, class Words = ScalarWords>
FA_FN T softcap_tanh(T score, T inverse_softcap) {
  return Words::tanh(score * inverse_softcap);
}

/// d(capped score) / d(score), from the tanh above.
template <class T>
FA_FN T softcap_derivative(T tanh_value) {
  return 1.0f - tanh_value * tanh_value;
}

/// What ALiBi adds to the score of a query `distance` = row + seqlen_k - seqlen_q - key away from its key (Press et al. 2021,
/// in the symmetric form that flash-attention uses when not causal).
template <class T, class Words = ScalarWords>
FA_FN T alibi_bias(T slope, T distance) {
  return -slope * Words::abs(distance);
}

}  // namespace flash_attn
