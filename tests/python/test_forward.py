"""out = softmax(scale q k^T) v, for every dtype, shape and way of passing q, k and v."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracle
import pytest
from support import (
    DTYPES,
    FORWARD_TOLERANCE,
    ROUNDING,
    assert_as_precise,
    assert_close,
    check,
    expected,
    name_of,
    normal,
    qkv,
    representation_slack,
    to_numpy,
)

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

SEQLENS = [(1, 1), (1, 239), (2, 1), (17, 16), (64, 64), (113, 203), (128, 217), (203, 113), (256, 257), (300, 1)]
HEAD_DIMS = [1, 2, 3, 7, 8, 16, 31, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256, 288, 512, 576]
DIM_PAIRS = [(1, 576), (576, 512), (192, 128), (64, 512), (64, 1), (33, 17), (128, 130)]
HEADS = [(1, 1), (6, 6), (6, 2), (6, 1), (9, 3)]


def check_forward(arguments: dict, **options: object) -> None:
    out = to_numpy(flash_attn_func(**arguments, **options))
    want = expected(arguments | options).out
    rounding = ROUNDING[arguments["q"].dtype]
    if rounding is oracle.exact:
        assert_close("out", out, want, FORWARD_TOLERANCE)
        return
    same_precision = expected(arguments | options, rounding=rounding).out
    assert_as_precise("out", out, want, same_precision, rounding, slack=representation_slack(want, rounding))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SEQLENS)
def test_every_pair_of_sequence_lengths(rng, seqlen_q, seqlen_k, causal, dtype):
    check_forward(qkv(rng, 2, seqlen_q, seqlen_k, 4, 2, 40, dtype=dtype), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_head_dim(rng, dim, dtype):
    check_forward(qkv(rng, 1, 37, 70, 2, 1, dim, dtype=dtype), causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("dim", "dim_v"), DIM_PAIRS)
def test_values_may_have_another_head_dim(rng, dim, dim_v, dtype):
    check_forward(qkv(rng, 1, 37, 70, 2, 1, dim, dim_v, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("heads", "heads_k"), HEADS)
def test_query_heads_share_kv_heads_in_order(rng, heads, heads_k, dtype):
    check_forward(qkv(rng, 2, 45, 50, heads, heads_k, dtype=dtype))


@pytest.mark.parametrize("softmax_scale", [None, 0.0, 0.3, -0.7, 3.0])
def test_softmax_scale_may_be_anything_finite(rng, softmax_scale):
    check_forward(qkv(rng), softmax_scale=softmax_scale)


def test_causal_is_aligned_bottom_right(rng):
    arguments = qkv(rng, 1, 5, 3, 1)
    out = to_numpy(flash_attn_func(**arguments, causal=True))
    assert np.all(out[0, :2] == 0)  # these queries come before the first key
    np.testing.assert_allclose(out[0, 2], to_numpy(arguments["v"])[0, 0], rtol=1e-6)
    np.testing.assert_allclose(out[0, 4], expected(arguments).out[0, 4], atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_key_gives_its_value_exactly(rng, dtype):
    arguments = qkv(rng, 2, 9, 1, dtype=dtype)
    out = flash_attn_func(**arguments)
    assert mx.array_equal(out, mx.broadcast_to(arguments["v"], out.shape))


def test_large_scores_do_not_overflow(rng):
    """Their own rounding in float32 is what is left: exp turns it into a relative error."""
    arguments = qkv(rng, 1, 40)
    arguments["q"] = arguments["q"] * 1e4
    want = expected(arguments)
    largest_score = np.abs(want.lse).max()
    assert largest_score > 1e4
    out = to_numpy(flash_attn_func(**arguments))
    assert_close("out", out, want.out, 8 * 2.0**-23 * largest_score)


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [((0, 5, 4, 8), (0, 7, 4, 8)), ((2, 0, 4, 8), (2, 7, 4, 8)), ((2, 5, 4, 8), (2, 0, 4, 8)), ((0, 0, 4, 8), (0, 0, 4, 8))],
)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_tensors_give_zeros_of_the_right_shape(q_shape, k_shape, causal):
    out, lse = flash_attn_func(mx.ones(q_shape), mx.ones(k_shape), mx.ones(k_shape), causal=causal, return_softmax_lse=True)
    assert out.shape == q_shape
    assert lse.shape == (q_shape[0], q_shape[2], q_shape[1])
    assert np.all(np.array(out) == 0)
    assert np.all(np.array(lse) == -np.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_packed_forms_equal_separate_tensors(rng, dtype):
    packed = normal(rng, 2, 50, 3, 4, 32, dtype=dtype)
    q, k, v = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
    want = flash_attn_func(q, k, v, causal=True)
    assert mx.array_equal(flash_attn_qkvpacked_func(packed, causal=True), want)
    assert mx.array_equal(flash_attn_kvpacked_func(q, packed[:, :, 1:], causal=True), want)


STRIDED_VIEWS = {
    "heads before sequence": lambda x: mx.contiguous(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
    "every other row": lambda x: mx.repeat(x, 2, axis=1)[:, ::2],
    "reversed rows": lambda x: mx.contiguous(x[:, ::-1])[:, ::-1],
    "last axis strided": lambda x: mx.repeat(x, 3, axis=3)[..., ::3],
    "last axis first": lambda x: mx.contiguous(x.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0),
    "inside a larger tensor": lambda x: mx.pad(x, [(1, 1), (2, 3), (1, 0), (4, 4)])[1:-1, 2:-3, 1:, 4:-4],
}


@pytest.mark.parametrize("view", STRIDED_VIEWS.values(), ids=STRIDED_VIEWS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_do_not_matter(rng, view, dtype):
    arguments = qkv(rng, 2, 37, 41, 4, 2, dtype=dtype)
    want = flash_attn_func(**arguments, causal=True)
    views = {name: view(x) for name, x in arguments.items()}
    mx.eval(views)
    assert mx.array_equal(flash_attn_func(**views, causal=True), want)


def test_broadcast_inputs_are_read_with_stride_zero(rng):
    arguments = qkv(rng, 1, 20)
    want = mx.repeat(flash_attn_func(**arguments), 3, axis=0)
    views = {name: mx.broadcast_to(x, (3, *x.shape[1:])) for name, x in arguments.items()}
    assert mx.array_equal(flash_attn_func(**views), want)


# What the score of a key is more than that of the one before it, by position: the running maximum follows, or may stay.
RISES = {
    "slowly": lambda key: 0.05,
    "much from key to key": lambda key: 1.0 * (key < 60),
    "and fall": lambda key: -1.0 * (key < 60),
    "once, by more than float32 has room for": lambda key: 100.0 * (key == 75),
    "often": lambda key: 12.0 * (key % 40 == 13),
    "up and down": lambda key: 30.0 * (-1) ** (key // 20) * (key % 20 == 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("softcap", [0.0, 50.0], ids=["", "softcap"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("rise", RISES.values(), ids=RISES)
def test_scores_rise_from_key_to_key(rng, rise, causal, softcap, dtype):
    arguments = qkv(rng, 1, 150, 200, 2, 1, 40, dtype=dtype)
    q, k = np.array(arguments["q"].astype(mx.float32)), np.array(arguments["k"].astype(mx.float32))
    q[..., 0] = 1.0
    k[..., 0] = np.cumsum([rise(key) for key in range(k.shape[1])])[None, :, None]
    arguments |= {"q": mx.array(q).astype(dtype), "k": mx.array(k).astype(dtype)}
    check(arguments | {"softmax_scale": 1.0, "causal": causal, "softcap": softcap}, rng)
