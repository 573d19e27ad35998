"""The log-sum-exp: natural log, float32, -inf for a row without a key, and differentiable."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import (
    DTYPES,
    LSE_TOLERANCE,
    Cotangents,
    assert_close,
    expected,
    integers,
    name_of,
    normal,
    packed_qkv,
    qkv,
    run,
    to_numpy,
)

from flash_attn import flash_attn_func, flash_attn_varlen_func

OPTIONS = [{}, {"causal": True}, {"window_size": (5, 2)}, {"softcap": 2.0}, {"softmax_scale": 3.0}, {"attention_chunk": 9}]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values(rng, options, dtype):
    arguments = qkv(rng, 2, 40, 70, 4, 2, dtype=dtype) | options
    _, lse = flash_attn_func(**arguments, return_softmax_lse=True)
    assert lse.dtype == mx.float32
    assert lse.shape == (2, 4, 40)
    assert_close("lse", to_numpy(lse), expected(arguments).lse, LSE_TOLERANCE)


def test_packed_sequences_put_heads_first(rng):
    arguments = packed_qkv(rng, [5, 9], [7, 3])
    want = expected(arguments).lse
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    _, lse = flash_attn_varlen_func(*(arguments[name] for name in names), return_softmax_lse=True)
    assert lse.shape == (4, 14)
    assert_close("lse", to_numpy(lse), want, LSE_TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_row_without_a_visible_key_has_lse_minus_infinity_and_no_gradient(rng, dtype):
    arguments = qkv(rng, 1, 9, 4, 2, dtype=dtype) | {"causal": True}
    cotangents = Cotangents(mx.ones((1, 9, 2, 32), dtype), mx.ones((1, 2, 9)))
    result = run(arguments, cotangents)
    assert np.all(result.lse[..., :5] == -np.inf)
    assert np.all(np.isfinite(result.lse[..., 5:]))
    assert np.all(result.out[:, :5] == 0)
    assert np.all(result.gradients["q"][:, :5] == 0)
    assert all(np.all(np.isfinite(gradient)) for gradient in result.gradients.values())


def test_every_row_empty(rng):
    arguments = qkv(rng, 2, 7, 9) | {"attn_mask": mx.zeros((7, 9), mx.bool_)}
    result = run(arguments, Cotangents(mx.ones((2, 7, 4, 32)), mx.ones((2, 4, 7))))
    assert np.all(result.out == 0)
    assert np.all(result.lse == -np.inf)
    assert all(np.all(gradient == 0) for gradient in result.gradients.values())


def test_a_row_without_a_key_has_its_sink_as_lse_and_hands_it_the_cotangent(rng):
    arguments = qkv(rng, 1, 5, 2, 3) | {"causal": True, "learnable_sink": mx.array([0.5, -1.0, 2.0])}
    cotangent = np.zeros((1, 3, 5), np.float32)
    cotangent[0, :, 0] = [1.0, 10.0, 100.0]  # row 0 sees nothing
    result = run(arguments, Cotangents(mx.zeros((1, 5, 3, 32)), mx.array(cotangent)))
    np.testing.assert_allclose(result.lse[0, :, 0], [0.5, -1.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(result.gradients["learnable_sink"], [1.0, 10.0, 100.0], rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_its_gradient_alone(rng, options):
    arguments = qkv(rng, 2, 33, 40, 4, 2) | options
    cotangents = Cotangents(mx.zeros((2, 33, 4, 32)), normal(rng, 2, 4, 33))
    got, want = run(arguments, cotangents).gradients, expected(arguments, cotangents).gradients
    for name in want:
        assert_close(name, got[name], want[name], 1e-4)
    assert np.all(got["v"] == 0)


def test_an_unused_lse_changes_no_gradient(rng):
    arguments = list(qkv(rng).values())
    with_lse = mx.grad(lambda *x: flash_attn_func(*x, return_softmax_lse=True)[0].sum(), argnums=(0, 1, 2))(*arguments)
    without = mx.grad(lambda *x: flash_attn_func(*x).sum(), argnums=(0, 1, 2))(*arguments)
    assert all(mx.array_equal(a, b) for a, b in zip(with_lse, without, strict=True))


def test_a_gradient_through_lse_only_needs_no_out(rng):
    q, k, v = qkv(rng).values()
    gradient = mx.grad(lambda q: flash_attn_func(q, k, v, return_softmax_lse=True)[1].sum())(q)
    cotangents = Cotangents(mx.zeros_like(q), mx.ones((2, 4, 33)))
    assert_close("dq", to_numpy(gradient), expected({"q": q, "k": k, "v": v}, cotangents).gradients["q"], 1e-4)


def test_lse_of_a_slot_past_seqused_is_minus_infinity(rng):
    arguments = qkv(rng, 2, 8) | {"seqused_q": integers(3, 8)}
    _, lse = flash_attn_func(**arguments, return_softmax_lse=True, learnable_sink=mx.zeros((4,)))
    assert np.all(np.array(lse)[0, :, 3:] == -np.inf)
    assert np.all(np.isfinite(np.array(lse)[0, :, :3]))
