// A call's arrays as the one list that a graph node carries, and back.
#pragma once

#include <array>
#include <bitset>
#include <optional>
#include <vector>

#include "ops/call/call.h"

namespace flash_attn {

struct OptionalInput {
  std::optional<mx::array> OptionalInputs::*member;
  bool is_run;  // kernels read it as a plain run of values; the others in any strides
  const char* name;
};

/// The order in which a node's inputs follow q, k and v.
inline constexpr std::array<OptionalInput, 22> optional_inputs = {{
    {&OptionalInputs::attn_mask, false, "attn_mask"},
    {&OptionalInputs::learnable_sink, true, "learnable_sink"},
    {&OptionalInputs::alibi_slopes, true, "alibi_slopes"},
    {&OptionalInputs::cu_seqlens_q, true, "cu_seqlens_q"},
    {&OptionalInputs::cu_seqlens_k, true, "cu_seqlens_k"},
    {&OptionalInputs::seqused_q, true, "seqused_q"},
    {&OptionalInputs::seqused_k, true, "seqused_k"},
    {&OptionalInputs::dropout_key, true, "dropout_key"},
    {&OptionalInputs::k_scales, false, "k_scales"},
    {&OptionalInputs::k_biases, false, "k_biases"},
    {&OptionalInputs::v_scales, false, "v_scales"},
    {&OptionalInputs::v_biases, false, "v_biases"},
    {&OptionalInputs::qv, false, "qv"},
    {&OptionalInputs::block_table, true, "block_table"},
    {&OptionalInputs::cache_batch_idx, true, "cache_batch_idx"},
    {&OptionalInputs::cache_leftpad, true, "cache_leftpad"},
    {&OptionalInputs::k_new, false, "k_new"},
    {&OptionalInputs::v_new, false, "v_new"},
    {&OptionalInputs::cu_seqlens_k_new, true, "cu_seqlens_k_new"},
    {&OptionalInputs::rotary_cos, true, "rotary_cos"},
    {&OptionalInputs::rotary_sin, true, "rotary_sin"},
    {&OptionalInputs::rotary_seqlens, true, "rotary_seqlens"},
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
