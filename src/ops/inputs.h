// A call's arrays as the one list that a graph node carries, and back.
#pragma once

#include <array>
#include <bitset>
#include <optional>
#include <vector>

#include "ops/call.h"

namespace flash_attn {

/// The order in which a node's inputs follow q, k and v.
inline constexpr std::array<std::optional<mx::array> OptionalInputs::*, 8> optional_inputs = {
    &OptionalInputs::attn_mask,    &OptionalInputs::learnable_sink, &OptionalInputs::alibi_slopes,
    &OptionalInputs::cu_seqlens_q, &OptionalInputs::cu_seqlens_k,   &OptionalInputs::seqused_q,
    &OptionalInputs::seqused_k,    &OptionalInputs::dropout_key};

/// Bit i: optional_inputs[i] is there.
using Presence = std::bitset<optional_inputs.size()>;

Presence presence(const OptionalInputs& optional);

/// q, k, v and the optional arrays that are there.
std::vector<mx::array> node_inputs(const AttentionCall& call);

/// The call of a node. `problem` gives the features; the sizes are those of the arrays, since mx.compile(shapeless=True) reuses
/// a node for other shapes.
AttentionCall call_of_node(AttentionProblem problem, Presence present, const std::vector<mx::array>& inputs, mx::Stream stream);

/// The sizes of a problem from its arrays, except max_seqlen of packed sequences, which no array shows.
void set_sizes(AttentionProblem& problem, const mx::array& q, const mx::array& k, const mx::array& v,
               const OptionalInputs& optional);

}  // namespace flash_attn
