"""dq, dk, dv against the formulas in float64, and against finite differences of our own forward."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracle
import pytest
from support import DTYPES, attention, check, name_of, normal, packed_qkv, qkv, to_numpy

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

SEQLENS = [(1, 1), (1, 239), (239, 1), (17, 16), (64, 64), (113, 203), (203, 113), (257, 256)]
HEAD_DIMS = [1, 3, 8, 31, 40, 64, 111, 128, 192, 256, 576]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SEQLENS)
def test_every_pair_of_sequence_lengths(rng, seqlen_q, seqlen_k, causal, dtype):
    check(qkv(rng, 2, seqlen_q, seqlen_k, 4, 2, 40, dtype=dtype) | {"causal": causal}, rng)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_head_dim(rng, dim, dtype):
    check(qkv(rng, 1, 37, 70, 2, 1, dim, dtype=dtype) | {"causal": True}, rng)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("dim", "dim_v"), [(576, 512), (192, 128), (64, 200), (33, 17), (5, 1)])
def test_values_may_have_another_head_dim(rng, dim, dim_v, dtype):
    check(qkv(rng, 1, 37, 50, 2, 1, dim, dim_v, dtype=dtype), rng)


@pytest.mark.parametrize(("heads", "heads_k"), [(6, 6), (6, 2), (6, 1), (9, 3)])
def test_gradients_of_a_kv_head_sum_over_its_query_heads(rng, heads, heads_k):
    check(qkv(rng, 2, 45, 50, heads, heads_k), rng)


@pytest.mark.parametrize("size", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_tensors_have_empty_or_zero_gradients(size):
    batch, seqlen_q, seqlen_k = size
    q, k = mx.ones((batch, seqlen_q, 4, 8)), mx.ones((batch, seqlen_k, 2, 8))
    gradients = mx.grad(lambda q, k, v: flash_attn_func(q, k, v).sum(), argnums=(0, 1, 2))(q, k, k)
    for gradient, x in zip(gradients, (q, k, k), strict=True):
        assert gradient.shape == x.shape
        assert np.all(np.array(gradient) == 0)


def directional_derivative(function, inputs: list[np.ndarray], direction: list[np.ndarray], step: float) -> float:
    """Central difference of a scalar function along a direction."""
    plus = function([x + step * d for x, d in zip(inputs, direction, strict=True)])
    minus = function([x - step * d for x, d in zip(inputs, direction, strict=True)])
    return (plus - minus) / (2 * step)


FINITE_DIFFERENCE_CALLS = {
    "plain": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 2.0},
    "window": {"window_size": (3, 1)},
    "dropout": {"dropout_p": 0.3, "dropout_key": mx.array([7, 11], dtype=mx.uint32)},
    "alibi": {"alibi_slopes": mx.array([0.1, 0.2, 0.3, 0.4])},
    "chunk": {"attention_chunk": 5},
}


@pytest.mark.parametrize("options", FINITE_DIFFERENCE_CALLS.values(), ids=FINITE_DIFFERENCE_CALLS.keys())
def test_gradient_is_the_slope_of_the_forward(rng, options):
    inputs = [to_numpy(x) for x in qkv(rng, 1, 11, 13, 4, 2, 8).values()]
    direction = [rng.standard_normal(x.shape) for x in inputs]
    weight = rng.standard_normal((1, 11, 4, 8))
    values = {name: to_numpy(x) if isinstance(x, mx.array) else x for name, x in options.items()}
    slope = directional_derivative(
        lambda x: float((oracle.attention(*x, **values).out * weight).sum()), inputs, direction, 1e-5
    )

    def loss(q, k, v):
        return (attention(q, k, v, **options) * mx.array(weight.astype(np.float32))).sum()

    gradients = mx.grad(loss, argnums=(0, 1, 2))(*(mx.array(x.astype(np.float32)) for x in inputs))
    ours = sum(float((to_numpy(g) * d).sum()) for g, d in zip(gradients, direction, strict=True))
    assert abs(ours - slope) <= 1e-4 * max(1.0, abs(slope))


def test_our_own_forward_has_that_slope_too(rng):
    arguments = packed_qkv(rng, [5, 0, 9], [7, 4, 3], dim=8) | {"causal": True, "softcap": 3.0}
    names = ("q", "k", "v")
    inputs = [to_numpy(arguments[name]) for name in names]
    direction = [rng.standard_normal(x.shape) for x in inputs]
    weight = normal(rng, *arguments["q"].shape)

    def loss(*arrays):
        return (attention(**arguments | dict(zip(names, arrays, strict=True))) * weight).sum()

    def float_loss(values):
        return loss(*(mx.array(x.astype(np.float32)) for x in values)).item()

    slope = directional_derivative(float_loss, inputs, direction, 1e-2)
    gradients = mx.grad(loss, argnums=(0, 1, 2))(*(arguments[name] for name in names))
    ours = sum(float((to_numpy(g) * d).sum()) for g, d in zip(gradients, direction, strict=True))
    assert abs(ours - slope) <= 1e-2 * max(1.0, abs(slope))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_packed_forms_collect_the_gradients_of_their_parts(rng, dtype):
    packed = normal(rng, 2, 30, 3, 4, 16, dtype=dtype)
    weight = normal(rng, 2, 30, 4, 16, dtype=dtype)

    def separate(q, k, v):
        return (flash_attn_func(q, k, v, causal=True) * weight).sum()

    def qkvpacked(x):
        return (flash_attn_qkvpacked_func(x, causal=True) * weight).sum()

    def kvpacked(q, kv):
        return (flash_attn_kvpacked_func(q, kv, causal=True) * weight).sum()

    parts = mx.grad(separate, argnums=(0, 1, 2))(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2])
    want = mx.stack(parts, axis=2)
    assert mx.array_equal(mx.grad(qkvpacked)(packed), want)
    dq, dkv = mx.grad(kvpacked, argnums=(0, 1))(packed[:, :, 0], packed[:, :, 1:])
    assert mx.array_equal(dq, parts[0])
    assert mx.array_equal(dkv, want[:, :, 1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_strided_cotangent_is_read_right(rng, dtype):
    arguments = list(qkv(rng, 2, 33, 33, 4, 4, 16, dtype=dtype).values())
    heads_first = normal(rng, 2, 4, 33, 16, dtype=dtype)
    strided = heads_first.transpose(0, 2, 1, 3)
    _, want = mx.vjp(lambda *x: [flash_attn_func(*x)], arguments, [mx.contiguous(strided)])
    _, got = mx.vjp(lambda *x: [flash_attn_func(*x).transpose(0, 2, 1, 3)], arguments, [heads_first])
    assert all(mx.array_equal(a, b) for a, b in zip(got, want, strict=True))
