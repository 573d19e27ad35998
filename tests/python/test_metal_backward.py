"""The Metal backward kernels, run by the shim with every access checked, against float64."""

from __future__ import annotations

import os
from typing import Any

import combinations
import mlx.core as mx
import numpy as np
import pytest
from metal_support import metal_graph
from support import (
    DTYPES,
    Cotangents,
    check,
    cotangents_of,
    error,
    expected,
    integers,
    name_of,
    normal,
    packed_qkv,
    qkv,
    run,
    to_numpy,
)

from flash_attn import flash_attn_func

# Each tile shape, and dims that are no whole fragments.
HEAD_DIMS = [
    *((dim, mx.float16) for dim in (8, 33, 64, 96, 128, 192, 256)),
    *((dim, mx.float32) for dim in (33, 64, 128, 256)),
    *((dim, mx.bfloat16) for dim in (64, 192)),
]
OTHER_HEAD_DIMS = [
    (192, 128, mx.float16),
    (64, 200, mx.bfloat16),
    (33, 17, mx.float16),
    (5, 1, mx.float32),
    (1, 40, mx.bfloat16),
]
KEY = mx.array(np.array([123456789, 987654321], np.uint32))


def label(x: Any) -> str:
    return name_of(x) if isinstance(x, mx.Dtype) else str(x)


@pytest.fixture(autouse=True)
def shim():
    with metal_graph(os.environ.get("METAL_SHIM_MODE", "hooks")) as module:
        module.clear_reports()
        yield module


def check_on_metal(arguments: dict[str, Any], rng: np.random.Generator, module: Any) -> None:
    """Gradients agree with the oracle, and the kernels gave them."""
    module.clear_reports()
    check(arguments, rng)
    names = " ".join(report["function"] for report in module.reports())
    kernels = ["delta", "backward_dq", "backward_dkv"]
    if "attn_mask" in arguments and arguments["attn_mask"].dtype != mx.bool_:
        kernels.append("mask_gradient")
    assert all(f"flash_attn_{kernel}_" in names for kernel in kernels)


# ---- shapes


@pytest.mark.parametrize(("dim", "dtype"), HEAD_DIMS, ids=label)
def test_head_dims(rng, shim, dim, dtype):
    check_on_metal(qkv(rng, 1, 37, 70, 2, 1, dim, dtype=dtype) | {"causal": True}, rng, shim)


@pytest.mark.parametrize(("dim", "dim_v", "dtype"), OTHER_HEAD_DIMS, ids=label)
def test_values_may_have_another_head_dim(rng, shim, dim, dim_v, dtype):
    check_on_metal(qkv(rng, 1, 37, 50, 2, 1, dim, dim_v, dtype=dtype), rng, shim)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(1, 1), (1, 70), (70, 1), (8, 8), (33, 32), (32, 33), (65, 100), (100, 65), (90, 9)]
)
def test_ragged_lengths(rng, shim, seqlen_q, seqlen_k, causal):
    check_on_metal(qkv(rng, 2, seqlen_q, seqlen_k, 2, 1, 16) | {"causal": causal}, rng, shim)


@pytest.mark.parametrize(("heads", "heads_k"), [(4, 4), (6, 2), (3, 1), (16, 1)])
def test_gradients_of_a_kv_head_sum_over_its_query_heads(rng, shim, heads, heads_k):
    check_on_metal(qkv(rng, 2, 21, 40, heads, heads_k, 32, dtype=mx.float16) | {"causal": True}, rng, shim)


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=name_of)
def test_views_of_any_strides(rng, shim, dtype):
    q = normal(rng, 4, 2, 35, 32, dtype=dtype).transpose(1, 2, 0, 3)
    kv = normal(rng, 2, 51, 2, 2, 33, dtype=dtype)
    check_on_metal({"q": q, "k": kv[:, ::-1, 0, :, :32], "v": kv[:, :, 1, :, 1:], "causal": True}, rng, shim)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cotangent_may_be_a_view(rng, transposed):
    arguments = qkv(rng, 1, 20, 30, 2, 1)
    cotangents = cotangents_of(arguments, rng)
    dout = np.array(cotangents.out)
    view = mx.array(np.ascontiguousarray(dout.transpose(3, 2, 1, 0))).transpose(3, 2, 1, 0) if transposed else None
    view = mx.array(np.repeat(dout, 2, axis=1))[:, ::2] if view is None else view
    got = run(arguments, Cotangents(view, cotangents.lse))
    want = run(arguments, cotangents)
    for name, gradient in want.gradients.items():
        np.testing.assert_array_equal(got.gradients[name], gradient)


def test_a_broadcast_cotangent(rng):
    arguments = qkv(rng, 1, 20, 30, 2, 1)
    got = mx.grad(lambda q: flash_attn_func(q, arguments["k"], arguments["v"]).sum())(arguments["q"])
    want = expected(arguments, Cotangents(mx.ones(arguments["q"].shape), mx.zeros((1, 2, 20)))).gradients["q"]
    assert error(to_numpy(got), want) < 1e-4


# ---- which keys a query sees


@pytest.mark.parametrize("window", [(0, 0), (5, 0), (0, 5), (7, 3), (40, -1), (-1, 4), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(70, 70), (30, 90), (90, 30)])
def test_windows(rng, shim, seqlen_q, seqlen_k, window):
    check_on_metal(qkv(rng, 1, seqlen_q, seqlen_k, 4, 2, 24) | {"window_size": window}, rng, shim)


@pytest.mark.parametrize("attention_chunk", [1, 7, 16, 2**31 - 1])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(50, 50), (20, 61), (61, 20)])
def test_chunks(rng, shim, seqlen_q, seqlen_k, attention_chunk):
    arguments = qkv(rng, 1, seqlen_q, seqlen_k, 2, 1, 24)
    check_on_metal(arguments | {"attention_chunk": attention_chunk, "causal": True}, rng, shim)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_packed_sequences(rng, shim, dtype, causal):
    arguments = packed_qkv(rng, [5, 0, 40, 33], [9, 3, 0, 65], 4, 2, 32, dtype=dtype)
    check_on_metal(arguments | {"causal": causal}, rng, shim)


def test_gradients_of_packed_rows_of_no_sequence_are_zero(rng, shim):
    arguments = packed_qkv(rng, [20, 30, 14], [30, 30, 30])
    arguments |= {"cu_seqlens_q": integers(3, 20, 50, 60), "cu_seqlens_k": integers(2, 30, 31, 77)}
    check_on_metal(arguments | {"max_seqlen_k": 46, "causal": True}, rng, shim)


def test_used_lengths(rng, shim):
    arguments = qkv(rng, 3, 40, 70, 4, 2) | {"seqused_q": integers(17, 40, 0), "seqused_k": integers(33, 0, 70)}
    check_on_metal(arguments | {"causal": True}, rng, shim)


def test_used_lengths_of_packed_sequences(rng, shim):
    arguments = packed_qkv(rng, [20, 30, 14], [30, 50, 30])
    check_on_metal(arguments | {"seqused_q": integers(20, 9, 0), "seqused_k": integers(0, 33, 30)}, rng, shim)


def test_a_window_costs_what_it_shows(rng, shim):
    """Blocks that nobody sees are left out of all products."""
    arguments = qkv(rng, 1, 256, 256, 1, 1, 64, dtype=mx.float16) | {"window_size": (31, 0)}
    run(arguments, cotangents_of(arguments, rng))
    pairs = sum(min(row + 1, 32) for row in range(256))
    for kernel, products in (("backward_dq", 3), ("backward_dkv", 4)):
        (flops,) = (report["matrix_flops"] for report in shim.reports() if f"_{kernel}_" in report["function"])
        assert flops <= 1.3 * products * 2 * 64 * pairs  # 8 x 8 staircases on both edges of 32 keys


# ---- scores


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=name_of)
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(rng, shim, softcap, dtype):
    arguments = qkv(rng, 1, 40, 50, 2, 1, dtype=dtype)
    check_on_metal(arguments | {"q": arguments["q"] * 3, "softcap": softcap, "causal": True}, rng, shim)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_alibi(rng, shim, per_sequence):
    slopes = normal(rng, *((3, 4) if per_sequence else (4,)))
    check_on_metal(qkv(rng, 3, 30, 45, 4, 2) | {"alibi_slopes": slopes}, rng, shim)


@pytest.mark.parametrize("causal", [False, True])
def test_a_sink_has_a_gradient(rng, shim, causal):
    check_on_metal(qkv(rng, 2, 33, 29, 4, 2) | {"learnable_sink": normal(rng, 4), "causal": causal}, rng, shim)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(32, mx.float16), (32, mx.float32), (128, mx.bfloat16), (192, mx.float16)], ids=label
)
def test_dropout(rng, shim, dim, dtype):
    arguments = qkv(rng, 2, 50, 70, 4, 2, dim, dtype=dtype)
    check_on_metal(arguments | {"dropout_p": 0.17, "dropout_key": KEY, "causal": True}, rng, shim)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_lse_has_a_gradient(rng, shim, dtype):
    """Of lse alone: D is its cotangent, dV is 0."""
    arguments = qkv(rng, 2, 30, 45, 4, 2, dtype=dtype)
    cotangents = cotangents_of(arguments, rng)
    cotangents.out = mx.zeros_like(cotangents.out)
    got, want = run(arguments, cotangents), expected(arguments, cotangents)
    assert np.all(got.gradients["v"] == 0)
    for name in ("q", "k"):
        assert error(got.gradients[name], want.gradients[name]) < (1e-5 if dtype == mx.float32 else 1e-2)


@pytest.mark.parametrize("features", combinations.sample(20, seed=11), ids=combinations.name_of)
def test_features_together(rng, features):
    check(combinations.build(rng, features), rng)


# ---- attn_mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "axes",
    [(1, 1, 1, 1), (2, 4, 35, 50), (1, 1, 35, 50), (1, 4, 35, 50), (2, 1, 1, 50), (1, 4, 1, 50), (2, 1, 35, 1), (2, 4, 1, 1)],
    ids=str,
)
def test_the_gradient_of_a_mask_has_its_shape(rng, shim, axes, causal):
    mask = normal(rng, *axes)
    check_on_metal(qkv(rng, 2, 35, 50, 4, 2) | {"attn_mask": mask, "causal": causal}, rng, shim)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, mx.float16), (128, mx.bfloat16), (256, mx.float16), (96, mx.float32), (256, mx.float32)], ids=label
)
def test_the_gradient_of_a_mask_at_every_tile_shape(rng, shim, dim, dtype):
    mask = normal(rng, 1, 2, 35, 50, dtype=dtype)
    check_on_metal(qkv(rng, 2, 35, 50, 2, 1, dim, dtype=dtype) | {"attn_mask": mask}, rng, shim)


@pytest.mark.parametrize("rows", [1, 35])
def test_the_gradient_of_a_mask_with_other_features(rng, shim, rows):
    arguments = qkv(rng, 2, 35, 50, 4, 2, 40, 24, dtype=mx.float32)
    arguments |= {"softcap": 3.0, "alibi_slopes": normal(rng, 4), "dropout_p": 0.2, "dropout_key": KEY}
    arguments |= {"window_size": (20, 5), "seqused_k": integers(50, 31), "attn_mask": normal(rng, 1, 4, rows, 50)}
    check_on_metal(arguments, rng, shim)


@pytest.mark.parametrize("axes", [(3, 4, 40, 65), (1, 1, 40, 65), (3, 1, 1, 65)], ids=str)
def test_the_gradient_of_a_mask_over_packed_sequences(rng, shim, axes):
    arguments = packed_qkv(rng, [5, 40, 33], [9, 3, 65], 4, 2, 32)
    check_on_metal(arguments | {"attn_mask": normal(rng, *axes), "causal": True}, rng, shim)


def test_minus_infinity_in_a_mask_hides(rng, shim):
    mask = np.where(rng.random((2, 1, 35, 50)) > 0.5, 0.0, -np.inf).astype(np.float32)
    mask[:, :, 3] = -np.inf
    check_on_metal(qkv(rng, 2, 35, 50, 4, 2) | {"attn_mask": mx.array(mask)}, rng, shim)


def test_a_boolean_mask_hides(rng, shim):
    mask = rng.random((1, 4, 35, 50)) > 0.5
    mask[:, :, :, 40:] = False
    check_on_metal(qkv(rng, 2, 35, 50, 4, 2) | {"attn_mask": mx.array(mask)}, rng, shim)


# ---- what nobody may see


def poisoned(x: mx.array, index: Any, value: float) -> mx.array:
    copy = np.array(x)
    copy[index] = value
    return mx.array(copy)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_keys_past_seqused_leave_no_trace(rng, value):
    arguments = qkv(rng, 2, 20, 70, 4, 2) | {"seqused_k": integers(33, 64), "causal": True}
    cotangents = cotangents_of(arguments, rng)
    places = (np.array([0] * 37 + [1] * 6), np.array([*range(33, 70), *range(64, 70)]))
    bad = arguments | {name: poisoned(arguments[name], places, value) for name in ("k", "v")}
    got, want = run(bad, cotangents), run(arguments, cotangents)
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(got.gradients[name], want.gradients[name])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_cotangent_at_a_row_without_a_key_leaves_no_trace(rng, value):
    arguments = qkv(rng, 1, 40, 20, 2, 1) | {"causal": True, "learnable_sink": normal(rng, 2)}  # rows 0 to 19 see nothing
    cotangents = cotangents_of(arguments, rng)
    dirty = Cotangents(poisoned(cotangents.out, (0, slice(0, 20)), value), cotangents.lse)
    got, want = run(arguments, dirty), run(arguments, cotangents)
    for name, gradient in want.gradients.items():
        np.testing.assert_array_equal(got.gradients[name], gradient)
        assert np.all(np.isfinite(gradient))


def test_a_nan_key_at_a_masked_position_stays_there(rng):
    arguments = qkv(rng, 1, 40, 40, 2, 1) | {"causal": True}
    cotangents = cotangents_of(arguments, rng)
    clean = run(arguments, cotangents)
    dirty = run(arguments | {"k": poisoned(arguments["k"], (0, 30), np.nan)}, cotangents)
    np.testing.assert_allclose(dirty.gradients["q"][:, :30], clean.gradients["q"][:, :30], atol=1e-5)
    assert np.all(np.isnan(dirty.gradients["q"][:, 30:]))


def test_a_nan_key_hidden_by_a_mask_leaves_no_trace(rng):
    arguments = qkv(rng, 1, 40, 40, 2, 1)
    visible = np.arange(40) != 30
    arguments |= {"attn_mask": mx.array(np.broadcast_to(visible, (1, 1, 40, 40)))}
    cotangents = cotangents_of(arguments, rng)
    clean = run(arguments, cotangents)
    dirty = run(arguments | {"k": poisoned(arguments["k"], (0, 30), np.nan)}, cotangents)
    np.testing.assert_array_equal(dirty.gradients["q"], clean.gradients["q"])
    np.testing.assert_array_equal(dirty.gradients["k"], clean.gradients["k"])


# ---- order


@pytest.mark.parametrize(("dim", "dtype"), [(64, mx.float16), (256, mx.float32)], ids=label)
def test_gradients_do_not_depend_on_the_order_of_threads(rng, dim, dtype):
    arguments = qkv(rng, 1, 70, 90, 4, 2, dim, dtype=dtype) | {"causal": True, "attn_mask": normal(rng, 1, 1, 1, 90)}
    cotangents = cotangents_of(arguments, rng)
    results = []
    for seed in (0, 1 << 32, 2 << 32):  # low bits would also move exp2 by a few ulp
        with metal_graph("fast", seed):
            results.append(run(arguments, cotangents))
    for other in results[1:]:
        for name, gradient in results[0].gradients.items():
            np.testing.assert_array_equal(other.gradients[name], gradient)
