"""Packed sequences: each is computed as if it were alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import DTYPES, attention, check, integers, name_of, normal, on_reference, packed_qkv, to_numpy

from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.bert_padding import pad_input, unpad_input, unpad_input_for_concatenated_sequences

LENGTHS = {
    "equal": ([32, 32], [32, 32]),
    "ragged": ([1, 70, 33, 16], [65, 3, 33, 40]),
    "empty queries": ([0, 20, 0], [5, 20, 7]),
    "empty keys": ([4, 20, 6], [0, 30, 0]),
    "all empty but one": ([0, 0, 41], [0, 0, 41]),
    "one token each": ([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]),
    "one long": ([200], [150]),
}
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (7, 3)},
    "softcap": {"softcap": 5.0, "causal": True},
    "chunk": {"attention_chunk": 16},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_out_lse_and_gradients(rng, lengths, options, dtype):
    check(packed_qkv(rng, *lengths, dtype=dtype) | options, rng)


@pytest.mark.parametrize("dim_v", [16, 48])
def test_alibi_sink_and_mask_use_positions_in_the_sequence(rng, dim_v):
    arguments = packed_qkv(rng, [3, 20, 0, 9], [8, 11, 4, 9], dim=24, dim_v=dim_v)
    arguments |= {
        "alibi_slopes": normal(rng, 4, 4),
        "learnable_sink": normal(rng, 4),
        "attn_mask": normal(rng, 4, 1, 20, 11),
    }
    check(arguments, rng)


@pytest.mark.parametrize("causal", [False, True])
def test_seqused_shortens_sequences_inside_their_slots(rng, causal):
    arguments = packed_qkv(rng, [10, 20, 5, 8], [12, 9, 30, 8])
    check(arguments | {"seqused_q": integers(4, 20, 0, 7), "seqused_k": integers(12, 3, 30, 0), "causal": causal}, rng)


def test_seqused_shortens_dense_sequences(rng):
    arguments = {"q": normal(rng, 3, 20, 4, 16), "k": normal(rng, 3, 25, 2, 16), "v": normal(rng, 3, 25, 2, 16)}
    check(arguments | {"seqused_q": integers(20, 7, 0), "seqused_k": integers(3, 25, 11), "causal": True}, rng)


def test_rows_outside_every_sequence_are_zero(rng):
    q, k = normal(rng, 30, 4, 16), normal(rng, 30, 2, 16)
    bounds = integers(5, 12, 20)
    out, lse = flash_attn_varlen_func(q, k, k, bounds, bounds, 8, 8, return_softmax_lse=True)
    inside = np.zeros(30, bool)
    inside[5:20] = True
    assert np.all(np.array(out)[~inside] == 0)
    assert np.all(np.array(lse)[:, ~inside] == -np.inf)
    assert np.all(np.isfinite(np.array(lse)[:, inside]))
    check({"q": q, "k": k, "v": k, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 8, "max_seqlen_k": 8}, rng)


def test_no_sequences_at_all(rng):
    q = normal(rng, 6, 2, 8)
    out, lse = flash_attn_varlen_func(q, q, q, integers(0), integers(0), 0, 0, return_softmax_lse=True)
    assert np.all(np.array(out) == 0)
    assert np.all(np.array(lse) == -np.inf)


def test_equal_lengths_equal_the_dense_function(rng):
    q, k, v = (normal(rng, 3, 40, 4, 32) for _ in range(3))
    bounds = integers(0, 40, 80, 120)
    packed = flash_attn_varlen_func(*(x.reshape(120, 4, 32) for x in (q, k, v)), bounds, bounds, 40, 40, causal=True)
    np.testing.assert_allclose(
        np.array(packed).reshape(3, 40, 4, 32), np.array(flash_attn_func(q, k, v, causal=True)), atol=1e-6
    )


def test_packed_forms_equal_separate_tensors(rng):
    qkv = normal(rng, 50, 3, 4, 16)
    bounds = integers(0, 13, 50)
    want = flash_attn_varlen_func(qkv[:, 0], qkv[:, 1], qkv[:, 2], bounds, bounds, 37, 37, causal=True)
    assert mx.array_equal(flash_attn_varlen_qkvpacked_func(qkv, bounds, 37, causal=True), want)
    assert mx.array_equal(flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], bounds, bounds, 37, 37, causal=True), want)


BAD_BOUNDS = {
    "backwards": [0, 20, 5, 30],
    "past the end": [0, 10, 20, 1000],
    "negative": [-50, 10, 20, 30],
    "huge": [0, 2**31 - 1, 2**31 - 1, 2**31 - 1],
    "longer than max_seqlen": [0, 1, 2, 30],
}


@pytest.mark.parametrize("bounds", BAD_BOUNDS.values(), ids=BAD_BOUNDS.keys())
def test_bounds_that_are_not_there_yet_are_clamped_and_never_read_outside(rng, bounds):
    """Not evaluated at the call, so they cannot be refused; kernel and reference cut them alike."""
    q, k = normal(rng, 30, 4, 16), normal(rng, 30, 2, 16)

    def call():
        lazy = integers(*bounds) + 0
        return flash_attn_varlen_func(q, k, k, lazy, lazy, 12, 12, causal=True, return_softmax_lse=True)

    for got, want in zip(call(), on_reference(call), strict=True):
        np.testing.assert_allclose(to_numpy(got), to_numpy(want), atol=2e-5)


def test_unpad_then_pad_is_the_identity_on_valid_tokens(rng):
    x = normal(rng, 3, 7, 2, 5)
    mask = mx.array(rng.random((3, 7)) > 0.4)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    lengths = np.array(mask).sum(-1)
    assert np.array(cu_seqlens).tolist() == [0, *np.cumsum(lengths)]
    assert np.array(seqused).tolist() == lengths.tolist()
    assert max_seqlen == lengths.max()
    assert packed.shape == (lengths.sum(), 2, 5)
    assert mx.array_equal(pad_input(packed, indices, 3, 7), x * mask[..., None, None])


def test_unused_tokens_get_a_place_but_are_not_counted_as_used(rng):
    x = normal(rng, 2, 6, 4)
    mask = mx.array([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    unused = mx.array([[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]])
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert cu_seqlens.tolist() == [0, 3, 9]
    assert seqused.tolist() == [2, 4]
    assert max_seqlen == 6
    assert mx.array_equal(packed, x.reshape(12, 4)[indices])


def test_concatenated_sequences_become_sequences_of_their_own(rng):
    x = normal(rng, 2, 6, 4)
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(
        x, mx.array([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    )
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert cu_seqlens.tolist() == [0, 2, 5, 11]
    assert max_seqlen == 6
    assert mx.array_equal(packed, x.reshape(12, 4)[indices])


def test_padding_is_differentiable(rng):
    x, weight = normal(rng, 2, 5, 3), normal(rng, 2, 5, 3)
    mask = mx.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])

    def loss(x):
        packed, indices, *_ = unpad_input(x, mask)
        return (pad_input(packed * packed, indices, 2, 5) * weight).sum()

    np.testing.assert_allclose(np.array(mx.grad(loss)(x)), np.array(2 * x * weight * mask[..., None]), rtol=1e-6)


def test_padded_attention_through_unpadding(rng):
    q, k, v = (normal(rng, 2, 9, 2, 8) for _ in range(3))
    mask = mx.array([[1] * 9, [1] * 4 + [0] * 5])
    packed_q, indices, bounds, longest, _ = unpad_input(q, mask)
    packed_k, packed_v = unpad_input(k, mask)[0], unpad_input(v, mask)[0]
    packed = attention(
        packed_q, packed_k, packed_v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest
    )
    lengths = integers(9, 4)
    want = flash_attn_func(q, k, v, seqused_q=lengths, seqused_k=lengths)
    np.testing.assert_allclose(np.array(pad_input(packed, indices, 2, 9)), np.array(want), atol=1e-6)
