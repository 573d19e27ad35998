// Whether a Metal kernel can be trusted on this GPU. The first use of each specialisation computes a small call of the same
// kind twice, by the kernel and by the reference. A text that does not compile, or gives other numbers, is never used: one
// warning, and the reference computes.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "ops/call/call.h"

namespace flash_attn {

/// The kernels in question, by what tells their texts apart, and how each side computes the same small thing.
struct Probe {
  std::string texts;
  std::function<std::vector<mx::array>()> by_kernel;
  std::function<std::vector<mx::array>()> by_reference;
};

/// Probes at most once for the same texts. True under a test launcher that asks for no probes.
bool is_trusted(const Probe& probe, mx::Stream stream);

/// A call of a few dozen rows and keys, of which every array is short (fewer than 8 elements) exactly where the given one's is.
AttentionCall small_call_like(const AttentionCall& call);

/// For tests: nothing has been probed.
void forget_probes();

}  // namespace flash_attn
