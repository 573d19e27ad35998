"""Softcap, ALiBi, windows, sinks, chunks, qv and masks: each alone, and sampled together."""

from __future__ import annotations

import combinations
import mlx.core as mx
import numpy as np
import pytest
from support import DTYPES, check, expected, name_of, normal, packed_qkv, qkv, to_numpy

from flash_attn import flash_attn_combine, flash_attn_func

WINDOWS = [(0, 0), (-1, 0), (0, -1), (5, 0), (0, 5), (7, 3), (100, 100), (-1, 4), (4, -1), (2**31 - 1, 2**31 - 1), (None, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("softcap", [0.5, 15.0, 50.0])
def test_softcap_bounds_the_scores(rng, softcap, dtype):
    arguments = qkv(rng, 2, 40, 50, 4, 2, dtype=dtype)
    check(arguments | {"q": arguments["q"] * 5, "softcap": softcap, "causal": True}, rng)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", WINDOWS)
def test_a_window_is_literal_around_the_diagonal(rng, window_size, causal):
    arguments = qkv(rng, 2, 37, 53, 2, 1)
    literal = tuple(-1 if side is None else side for side in window_size)
    out = flash_attn_func(**arguments, window_size=window_size, causal=causal)
    np.testing.assert_allclose(to_numpy(out), expected(arguments | {"window_size": literal, "causal": causal}).out, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("window_size", [(0, 0), (9, 2), (40, 0), (-1, 5)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(70, 70), (30, 90), (90, 30)])
def test_gradients_with_a_window(rng, seqlen_q, seqlen_k, window_size, dtype):
    check(qkv(rng, 1, seqlen_q, seqlen_k, 4, 2, dtype=dtype) | {"window_size": window_size}, rng)


def test_causal_is_a_window_without_a_right_side(rng):
    arguments = qkv(rng, 2, 33, 40)
    assert mx.array_equal(flash_attn_func(**arguments, causal=True), flash_attn_func(**arguments, window_size=(-1, 0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per_batch", [False, True])
def test_alibi_grows_with_the_distance_to_the_diagonal(rng, per_batch, causal, dtype):
    slopes = normal(rng, *((3, 4) if per_batch else (4,)))
    check(qkv(rng, 3, 30, 45, 4, 2, dtype=dtype) | {"alibi_slopes": slopes, "causal": causal}, rng)


def test_alibi_slopes_get_no_gradient(rng):
    arguments = qkv(rng)
    gradient = mx.grad(lambda slopes: flash_attn_func(**arguments, alibi_slopes=slopes).sum())(mx.ones((4,)))
    assert np.all(np.array(gradient) == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("sink_dtype", DTYPES, ids=name_of)
def test_a_sink_joins_the_denominator(rng, dtype, sink_dtype):
    arguments = qkv(rng, 2, 33, 29, 4, 2, dtype=dtype)
    check(arguments | {"learnable_sink": normal(rng, 4, dtype=sink_dtype), "causal": True}, rng)


def test_a_sink_of_minus_infinity_is_no_sink(rng):
    arguments = qkv(rng, 1, 20, 10)
    sink = mx.full((4,), -mx.inf)
    with_sink, lse = flash_attn_func(**arguments, learnable_sink=sink, causal=True, return_softmax_lse=True)
    without, lse_without = flash_attn_func(**arguments, causal=True, return_softmax_lse=True)
    assert mx.array_equal(with_sink, without)
    assert mx.array_equal(lse, lse_without)


@pytest.mark.parametrize("attention_chunk", [1, 7, 16, 1000, 2**31 - 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(50, 50), (20, 61), (61, 20)])
def test_a_query_sees_its_own_chunk(rng, seqlen_q, seqlen_k, causal, attention_chunk):
    check(qkv(rng, 1, seqlen_q, seqlen_k, 2, 1) | {"attention_chunk": attention_chunk, "causal": causal}, rng)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 128), (64, 512), (8, 8)])
def test_qv_adds_a_second_product(rng, dim, dim_v, dtype):
    arguments = qkv(rng, 1, 20, 30, 4, 1, dim, dim_v, dtype=dtype)
    check(arguments | {"qv": normal(rng, 1, 20, 4, dim_v, dtype=dtype), "causal": True}, rng)


def test_qv_of_packed_sequences(rng):
    arguments = packed_qkv(rng, [7, 12], [9, 12], heads_k=1, dim=16, dim_v=40)
    check(arguments | {"qv": normal(rng, 19, 4, 40), "causal": True}, rng)


MASK_SHAPES = [(37, 41), (1, 41), (37, 1), (1, 1), (4, 37, 41), (4, 1, 41), (2, 1, 37, 41), (2, 4, 37, 41), (2, 4, 1, 1), (41,)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_an_additive_mask_of_any_broadcast_shape_and_its_gradient(rng, shape):
    check(qkv(rng, 2, 37, 41, 4, 2) | {"attn_mask": normal(rng, *shape)}, rng)


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_a_boolean_mask_hides_keys(rng, shape):
    check(qkv(rng, 2, 37, 41, 4, 2) | {"attn_mask": mx.array(rng.random(shape) > 0.4)}, rng)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("mask_dtype", DTYPES, ids=name_of)
def test_a_mask_may_have_its_own_dtype(rng, dtype, mask_dtype):
    check(qkv(rng, 2, 20, 24, 2, 1, dtype=dtype) | {"attn_mask": normal(rng, 20, 24, dtype=mask_dtype)}, rng)


def test_minus_infinity_in_an_additive_mask_hides_a_key(rng):
    arguments = qkv(rng, 2, 30, 30, 4, 2)
    visible = rng.random((30, 30)) > 0.5
    visible[4] = False
    additive = mx.where(mx.array(visible), 0.0, -mx.inf)
    boolean = check(arguments | {"attn_mask": mx.array(visible)}, np.random.default_rng(1))
    same = check(arguments | {"attn_mask": additive}, np.random.default_rng(1))
    np.testing.assert_allclose(same.out, boolean.out, atol=1e-6)


@pytest.mark.parametrize("lowest", [-3.4028234663852886e38, -1e38, -1e9])
def test_a_large_negative_mask_weighs_its_keys_alike(rng, lowest):
    """As softmax does: a row whose mask is the lowest float everywhere still sees its keys."""
    arguments = qkv(rng, 1, 8, 8, 1)
    mask = np.zeros((8, 8), np.float32)
    mask[:, 4:] = lowest
    mask[3] = lowest
    out = to_numpy(flash_attn_func(**arguments, attn_mask=mx.array(mask)))
    v = to_numpy(arguments["v"])[0, :, 0]
    seen = [row for row in range(8) if row != 3]
    want = expected(arguments | {"attn_mask": mx.array(np.where(mask < 0, -np.inf, 0.0).astype(np.float32))}).out
    np.testing.assert_allclose(out[0, seen, 0], want[0, seen, 0], atol=2e-5)
    if lowest <= -1e38:
        np.testing.assert_allclose(out[0, 3, 0], v.mean(0), atol=2e-5)


def test_a_mask_view_is_read_by_its_strides(rng):
    arguments = qkv(rng, 2, 20, 30, 4)
    mask = normal(rng, 30, 40)
    assert mx.array_equal(
        flash_attn_func(**arguments, attn_mask=mask.T[::2, :]),
        flash_attn_func(**arguments, attn_mask=mx.contiguous(mask.T[::2, :])),
    )


@pytest.mark.parametrize("features", combinations.sample(150, seed=5), ids=combinations.name_of)
def test_features_combine(rng, features):
    check(combinations.build(rng, features), rng)


def test_combining_partial_results_equals_attention_over_all_keys(rng):
    arguments = qkv(rng, 2, 20, 60)
    want, lse = flash_attn_func(**arguments, return_softmax_lse=True)
    outs, lses = [], []
    for begin, end in [(0, 7), (7, 7), (7, 50), (50, 60)]:
        part = {"q": arguments["q"], "k": arguments["k"][:, begin:end], "v": arguments["v"][:, begin:end]}
        out_part, lse_part = flash_attn_func(**part, return_softmax_lse=True)
        outs.append(out_part)
        lses.append(lse_part.transpose(0, 2, 1))
    out, combined_lse = flash_attn_combine(mx.stack(outs), mx.stack(lses))
    np.testing.assert_allclose(np.array(out), np.array(want), atol=1e-5)
    np.testing.assert_allclose(np.array(combined_lse), np.array(lse.transpose(0, 2, 1)), atol=1e-5)


def test_combining_nothing_visible_gives_zero_and_minus_infinity():
    out, lse = flash_attn_combine(mx.ones((3, 1, 2, 1, 4)), mx.full((3, 1, 2, 1), -mx.inf))
    assert np.all(np.array(out) == 0)
    assert np.all(np.array(lse) == -np.inf)
