"""One mask, a pure function of key and position, wherever and however it is drawn."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracle
import pytest
from support import DTYPES, check, digest, integers, name_of, normal, on_reference, packed_qkv, qkv, run_python, to_numpy

from flash_attn import flash_attn_func, flash_attn_varlen_func

KEY = mx.array([0x12345678, 0x9ABCDEF0], dtype=mx.uint32)
NUMPY_KEY = np.array([0x12345678, 0x9ABCDEF0], np.uint32)


def kept_by_forward(batch: int, heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float, key: mx.array) -> np.ndarray:
    """The mask that the kernel applied: with equal scores and V the identity, an output is zero exactly where it dropped."""
    q = mx.zeros((batch, seqlen_q, heads, 1))
    k = mx.zeros((batch, seqlen_k, heads, 1))
    identity = mx.broadcast_to(mx.eye(seqlen_k)[None, :, None], (batch, seqlen_k, heads, seqlen_k))
    out = flash_attn_func(q, k, identity, dropout_p=dropout_p, dropout_key=key)
    return np.array(out).transpose(0, 2, 1, 3) != 0


def expected_mask(batch: int, heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float, key: np.ndarray) -> np.ndarray:
    kept = oracle.dropout_keep(key, dropout_p, np.arange(batch * heads), seqlen_q, seqlen_k)
    return kept.reshape(batch, heads, seqlen_q, seqlen_k)


SHAPES = [(1, 1, 1, 1), (2, 3, 16, 32), (2, 2, 17, 33), (1, 2, 130, 200), (1, 1, 300, 70)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.001, 0.17, 0.5, 0.99])
def test_the_forward_pass_draws_the_documented_mask(shape, dropout_p):
    assert np.array_equal(kept_by_forward(*shape, dropout_p, KEY), expected_mask(*shape, dropout_p, NUMPY_KEY))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_draws_the_same_mask(shape):
    got = on_reference(lambda: kept_by_forward(*shape, 0.17, KEY))
    assert np.array_equal(got, expected_mask(*shape, 0.17, NUMPY_KEY))


def test_the_backward_pass_draws_the_same_mask():
    """dV = dropped(P)^T dO: with equal scores and dO the identity, dV is zero exactly where the mask dropped."""
    seqlen_q, seqlen_k = 150, 90
    q, k = mx.zeros((1, seqlen_q, 1, 1)), mx.zeros((1, seqlen_k, 1, 1))
    v = mx.zeros((1, seqlen_k, 1, seqlen_q))
    _, (dv,) = mx.vjp(
        lambda v: [flash_attn_func(q, k, v, dropout_p=0.3, dropout_key=KEY)], [v], [mx.eye(seqlen_q)[None, :, None]]
    )
    kept = np.array(dv)[0, :, 0].T != 0
    assert np.array_equal(kept, expected_mask(1, 1, seqlen_q, seqlen_k, 0.3, NUMPY_KEY)[0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (20, 5)}, {"softcap": 4.0}], ids=str)
def test_out_and_gradients_with_dropout(rng, options, dtype):
    check(qkv(rng, 2, 65, 90, 4, 2, dtype=dtype) | options | {"dropout_p": 0.17, "dropout_key": KEY}, rng)


def test_packed_sequences_count_rows_and_columns_from_their_own_start(rng):
    check(packed_qkv(rng, [33, 5, 18], [40, 9, 50]) | {"dropout_p": 0.4, "dropout_key": KEY, "causal": True}, rng)


def test_s_dmask_holds_probabilities_negative_where_dropped(rng):
    arguments = qkv(rng, 2, 20, 45, 4, 2) | {"dropout_p": 0.25, "dropout_key": KEY, "causal": True}
    out, lse, S_dmask = flash_attn_func(**arguments, return_attn_probs=True)
    values = {name: to_numpy(x) if isinstance(x, mx.array) else x for name, x in arguments.items()}
    want = oracle.attention(**values)
    np.testing.assert_allclose(to_numpy(S_dmask), want.probabilities, atol=1e-6)
    np.testing.assert_allclose(to_numpy(out), want.out, atol=2e-5)
    np.testing.assert_allclose(to_numpy(lse), want.lse, atol=2e-5)


def test_s_dmask_of_packed_sequences_is_padded_with_zeros(rng):
    arguments = packed_qkv(rng, [3, 8], [10, 4]) | {"dropout_p": 0.25, "dropout_key": KEY}
    values = {name: to_numpy(x) if isinstance(x, mx.array) else x for name, x in arguments.items()}
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    positional = [arguments.pop(name) for name in names]
    S_dmask = flash_attn_varlen_func(*positional, **arguments, return_attn_probs=True)[2]
    assert S_dmask.shape == (2, 4, 8, 10)
    np.testing.assert_allclose(to_numpy(S_dmask), oracle.attention(**values).probabilities, atol=1e-6)


@pytest.mark.parametrize("dropout_p", [0.001, 1 / 300, 0.1, 0.17, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p(dropout_p):
    """Over keys every element's keep probability is exactly 1 - p; upstream's 8-bit threshold is off by up to 1 / 256."""
    drops, count = 0, 0
    for seed in range(40):
        kept = oracle.dropout_keep(np.array([seed * 7919, seed], np.uint32), dropout_p, np.arange(1), 128, 256)
        drops, count = drops + int((~kept).sum()), count + kept.size
    deviation = np.sqrt(dropout_p * (1 - dropout_p) / count)
    assert abs(drops / count - dropout_p) < 5 * deviation + 2.0**-24


def test_kept_probabilities_are_scaled_by_exactly_1_over_1_minus_p(rng):
    arguments = qkv(rng, 1, 40, 1, 2)  # one key: P is 1
    out = np.array(flash_attn_func(**arguments, dropout_p=0.75, dropout_key=KEY))
    v = np.broadcast_to(np.array(arguments["v"]), out.shape)
    kept = out != 0
    assert 0 < kept.sum() < kept.size
    assert np.array_equal(out[kept], v[kept] * 4)


def test_lse_ignores_dropout(rng):
    arguments = qkv(rng)
    _, with_dropout = flash_attn_func(**arguments, dropout_p=0.5, dropout_key=KEY, return_softmax_lse=True)
    _, without = flash_attn_func(**arguments, return_softmax_lse=True)
    assert mx.array_equal(with_dropout, without)


def test_a_key_decides_the_mask_and_none_draws_a_new_one(rng):
    arguments = qkv(rng)
    fixed = [flash_attn_func(**arguments, dropout_p=0.2, dropout_key=KEY) for _ in range(2)]
    assert mx.array_equal(*fixed)
    drawn = [flash_attn_func(**arguments, dropout_p=0.2) for _ in range(2)]
    assert not mx.array_equal(*drawn)


def test_mx_random_seed_makes_it_repeatable(rng):
    arguments = qkv(rng)
    results = []
    for _ in range(2):
        mx.random.seed(3)
        results.append(flash_attn_func(**arguments, dropout_p=0.2))
    assert mx.array_equal(*results)


def test_no_dropout_draws_nothing_from_mx_random(rng):
    arguments = qkv(rng)
    mx.random.seed(3)
    want = mx.random.uniform(shape=(4,))
    mx.random.seed(3)
    flash_attn_func(**arguments)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), want)


THREADED = """
import mlx.core as mx
import numpy as np
from support import cotangents_of, digest, packed_qkv, qkv, run
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(0)
key = {"dropout_p": 0.3, "dropout_key": mx.array([1, 2], dtype=mx.uint32), "causal": True}
for arguments in (qkv(rng, 2, 150, 130, 4, 2) | key, packed_qkv(rng, [100, 3, 60], [80, 9, 60]) | key):
    result = run(arguments, cotangents_of(arguments, rng))
    print(digest({"out": result.out, "lse": result.lse} | result.gradients))
"""


def test_every_thread_count_gives_the_same_bits():
    digests = {run_python(THREADED, FLASH_ATTENTION_MLX_THREADS=str(threads)) for threads in (1, 2, 3, 5)}
    assert len(digests) == 1


def test_dense_and_packed_sequences_of_one_batch_item_drop_alike(rng):
    q, k, v = (normal(rng, 1, 30, 2, 8) for _ in range(3))
    bounds = integers(0, 30)
    dense = flash_attn_func(q, k, v, dropout_p=0.3, dropout_key=KEY)
    packed = flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, 30, 30, dropout_p=0.3, dropout_key=KEY)
    assert digest([dense[0]]) == digest([packed])
