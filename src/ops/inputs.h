// A call's arrays as the one list that a graph node carries, and back.
#pragma once

#include <array>
#include <bitset>
#include <optional>
#include <vector>

#include "ops/call.h"

namespace flash_attn {

struct OptionalInput {
  std::optional<mx::array> OptionalInputs::*member;
  bool is_run;  // kernels read it as a plain run of values; the others in any strides
};

/// The order in which a node's inputs follow q, k and v.
inline constexpr std::array<OptionalInput, 22> optional_inputs = {{
    {&OptionalInputs::attn_mask, false},
    {&OptionalInputs::learnable_sink, true},
    {&OptionalInputs::alibi_slopes, true},
    {&OptionalInputs::cu_seqlens_q, true},
    {&OptionalInputs::cu_seqlens_k, true},
    {&OptionalInputs::seqused_q, true},
    {&OptionalInputs::seqused_k, true},
    {&OptionalInputs::dropout_key, true},
    {&OptionalInputs::k_scales, false},
    {&OptionalInputs::k_biases, false},
    {&OptionalInputs::v_scales, false},
    {&OptionalInputs::v_biases, false},
    {&OptionalInputs::qv, false},
    {&OptionalInputs::block_table, true},
    {&OptionalInputs::cache_batch_idx, true},
    {&OptionalInputs::cache_leftpad, true},
    {&OptionalInputs::k_new, false},
    {&OptionalInputs::v_new, false},
    {&OptionalInputs::cu_seqlens_k_new, true},
    {&OptionalInputs::rotary_cos, true},
    {&OptionalInputs::rotary_sin, true},
    {&OptionalInputs::rotary_seqlens, true},
}};

/// Bit i: optional_inputs[i] is there.
using Presence = std::bitset<optional_inputs.size()>;

Presence presence(const OptionalInputs& optional);

/// q, k, v and the optional arrays that are there.
std::vector<mx::array> node_inputs(const AttentionCall& call);

/// The call of a node. `problem` gives the features; the sizes are those of the arrays, since mx.compile(shapeless=True) reuses
/// a node for other shapes.
AttentionCall call_of_node(AttentionProblem problem, Presence present, const std::vector<mx::array>& inputs, mx::Stream stream);

/// Values along the last axis of k or v: of MLX's quantised triple, those that its codes stand for.
int values_of_codes(const mx::array& codes, const std::optional<mx::array>& biases);

/// The sizes of a problem from its arrays, except max_seqlen of packed sequences and of keys in pages, which no array shows.
void set_sizes(AttentionProblem& problem, const mx::array& q, const mx::array& k, const mx::array& v,
               const OptionalInputs& optional);

}  // namespace flash_attn
