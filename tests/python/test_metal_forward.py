"""The Metal forward kernel, run by the shim with every access checked, against float64."""

from __future__ import annotations

from typing import Any

import combinations
import kvcache_support
import mlx.core as mx
import numpy as np
import pytest
import test_kvcache_quantised as kvcache_quantised
from kvcache_support import cache_call, page
from metal_support import metal_graph
from support import (
    DTYPES,
    FORWARD_TOLERANCE,
    LSE_TOLERANCE,
    ROUNDING,
    assert_as_precise,
    assert_close,
    attention,
    error,
    expected,
    integers,
    name_of,
    normal,
    packed_qkv,
    qkv,
    representation_slack,
    to_numpy,
)

HEAD_DIMS = [(8, 8), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256)]
ODD_HEAD_DIMS = [(1, 1), (4, 4), (33, 33), (59, 59), (111, 111), (136, 136), (64, 33), (33, 128), (192, 128), (40, 200)]


@pytest.fixture(autouse=True)
def shim(request):
    with metal_graph(request.config.getoption("--metal-shim") or "hooks") as module:
        module.clear_reports()
        yield module


def forward(arguments: dict[str, Any], module: Any = None) -> tuple[np.ndarray, np.ndarray]:
    out, lse = attention(**arguments, return_softmax_lse=True)
    mx.eval(out, lse)
    if module is not None:
        assert any("forward" in report["function"] for report in module.reports())
    return to_numpy(out), to_numpy(lse)


def check(arguments: dict[str, Any], module: Any) -> None:
    out, lse = forward(arguments, module)
    want = expected(arguments)
    assert_close("lse", lse, want.lse, LSE_TOLERANCE)
    rounding = ROUNDING[arguments["q"].dtype]
    if arguments["q"].dtype == mx.float32:
        assert_close("out", out, want.out, FORWARD_TOLERANCE)
        return
    same_precision = expected(arguments, None, rounding)
    assert_as_precise("out", out, want.out, same_precision.out, rounding, slack=representation_slack(want.out, rounding))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_head_dims(rng, shim, dims, dtype):
    check(qkv(rng, 1, 37, 70, 2, 1, *dims, dtype) | {"causal": True}, shim)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dims", ODD_HEAD_DIMS, ids=str)
def test_head_dims_that_are_no_whole_fragments(rng, shim, dims, dtype):
    check(qkv(rng, 1, 21, 45, 2, 2, *dims, dtype) | {"causal": True}, shim)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(1, 1), (1, 7), (7, 1), (8, 8), (33, 32), (32, 33), (65, 100), (100, 65), (90, 9)]
)
def test_ragged_lengths(rng, shim, seqlen_q, seqlen_k, causal):
    check(qkv(rng, 2, seqlen_q, seqlen_k, 2, 1, 16) | {"causal": causal}, shim)


@pytest.mark.parametrize(("heads", "heads_k"), [(4, 4), (6, 2), (3, 1), (32, 1)])
def test_heads_of_a_group_share_blocks(rng, shim, heads, heads_k):
    check(qkv(rng, 2, 11, 40, heads, heads_k, 32, dtype=mx.float16) | {"causal": True}, shim)


@pytest.mark.parametrize("window", [(0, 0), (5, 0), (0, 5), (7, 3), (40, -1), (-1, 4), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(70, 70), (30, 90), (90, 30)])
def test_windows(rng, shim, seqlen_q, seqlen_k, window):
    check(qkv(rng, 1, seqlen_q, seqlen_k, 4, 2, 24) | {"window_size": window}, shim)


@pytest.mark.parametrize("attention_chunk", [1, 7, 16, 2**31 - 1])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(50, 50), (20, 61), (61, 20)])
def test_chunks(rng, shim, seqlen_q, seqlen_k, attention_chunk):
    check(qkv(rng, 1, seqlen_q, seqlen_k, 2, 1, 24) | {"attention_chunk": attention_chunk, "causal": True}, shim)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(rng, shim, softcap, dtype):
    arguments = qkv(rng, 1, 40, 50, 2, 1, dtype=dtype)
    check(arguments | {"q": arguments["q"] * 5, "softcap": softcap, "causal": True}, shim)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_alibi(rng, shim, per_sequence):
    slopes = normal(rng, *((3, 4) if per_sequence else (4,)))
    check(qkv(rng, 3, 30, 45, 4, 2) | {"alibi_slopes": slopes}, shim)


@pytest.mark.parametrize("causal", [False, True])
def test_a_sink_joins_the_denominator(rng, shim, causal):
    check(qkv(rng, 2, 33, 29, 4, 2) | {"learnable_sink": normal(rng, 4), "causal": causal}, shim)


def test_a_sink_of_minus_infinity_is_no_sink(rng):
    arguments = qkv(rng, 1, 20, 10)
    with_sink = forward(arguments | {"learnable_sink": mx.full((4,), -mx.inf), "causal": True})
    for got, want in zip(with_sink, forward(arguments | {"causal": True}), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", [mx.bool_, *DTYPES], ids=name_of)
@pytest.mark.parametrize("axes", [(1, 1, 1, 1), (2, 4, 35, 50), (1, 4, 1, 50), (2, 1, 35, 1), (1, 1, 35, 50)], ids=str)
def test_masks_broadcast(rng, shim, axes, kind):
    shape = tuple(n if axis != 1 else 1 for n, axis in zip((2, 4, 35, 50), axes, strict=True))
    mask = mx.array(rng.random(shape) > 0.3) if kind == mx.bool_ else normal(rng, *shape, dtype=kind)
    check(qkv(rng, 2, 35, 50, 4, 2) | {"attn_mask": mask, "causal": True}, shim)


def test_a_mask_may_be_a_view(rng, shim):
    mask = normal(rng, 50, 35, 2, 4).transpose(2, 3, 1, 0)[:, ::-1]
    check(qkv(rng, 2, 35, 50, 4, 2) | {"attn_mask": mask}, shim)


def test_a_mask_of_the_lowest_float_still_weighs_its_keys_alike(rng):
    arguments = qkv(rng, 1, 9, 40)
    out, _ = forward(arguments | {"attn_mask": mx.full((1, 1, 1, 40), float(np.finfo(np.float32).min))})
    mean = to_numpy(arguments["v"]).mean(1, keepdims=True)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=FORWARD_TOLERANCE)


def test_minus_infinity_in_a_mask_hides(rng, shim):
    mask = np.where(rng.random((2, 1, 35, 50)) > 0.5, 0.0, -np.inf).astype(np.float32)
    mask[:, :, 3] = -np.inf
    check(qkv(rng, 2, 35, 50, 4, 2) | {"attn_mask": mx.array(mask)}, shim)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dim", [32, 128, 192])
def test_dropout(rng, shim, dim, dtype):
    key = mx.array(np.array([123456789, 987654321], np.uint32))
    check(qkv(rng, 2, 50, 70, 4, 2, dim, dtype=dtype) | {"dropout_p": 0.17, "dropout_key": key, "causal": True}, shim)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_packed_sequences(rng, shim, dtype, causal):
    check(packed_qkv(rng, [5, 0, 40, 33], [9, 3, 0, 65], 4, 2, 32, dtype=dtype) | {"causal": causal}, shim)


def test_packed_rows_of_no_sequence_are_zero(rng):
    arguments = packed_qkv(rng, [20, 30, 14], [30, 30, 30])
    arguments |= {"cu_seqlens_q": unchecked(3, 20, 50, 60), "max_seqlen_q": 25, "causal": True}
    out, lse = forward(arguments)
    used = np.zeros(64, bool)
    for begin, length in ((3, 17), (20, 25), (50, 10)):
        used[begin : begin + length] = True
    want = expected(arguments)
    assert error(out[used], want.out[used]) < FORWARD_TOLERANCE
    assert np.all(out[~used] == 0)
    assert np.all(np.isneginf(lse[:, ~used]))


def test_sequences_that_run_backwards_stay_inside(rng):
    arguments = packed_qkv(rng, [20, 30, 14], [30, 30, 30])
    forward(arguments | {"cu_seqlens_q": unchecked(-5, 40, 10, 1000), "cu_seqlens_k": unchecked(50, 7, 2**31 - 1, -9)})


def test_used_lengths(rng, shim):
    check(
        qkv(rng, 3, 40, 70, 4, 2) | {"seqused_q": integers(17, 40, 0), "seqused_k": integers(33, 0, 70), "causal": True}, shim
    )


def test_used_lengths_of_packed_sequences(rng, shim):
    arguments = packed_qkv(rng, [20, 30, 14], [30, 50, 30])
    check(arguments | {"seqused_q": integers(20, 9, 0), "seqused_k": integers(0, 33, 30)}, shim)


def unchecked(*values: int) -> mx.array:
    """Values that a call cannot see yet."""
    return integers(*values) + 0


def test_lengths_beyond_what_exists_are_cut(rng):
    arguments = qkv(rng, 2, 20, 30)
    long = forward(arguments | {"seqused_k": unchecked(1000, 2**31 - 1), "seqused_q": unchecked(21, 20)})
    for got, want in zip(long, forward(arguments), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_views_of_any_strides(rng, shim, dtype):
    q = normal(rng, 4, 2, 35, 32, dtype=dtype).transpose(1, 2, 0, 3)
    kv = normal(rng, 2, 51, 2, 2, 33, dtype=dtype)
    check({"q": q, "k": kv[:, ::-1, 0, :, :32], "v": kv[:, :, 1, :, 1:], "causal": True}, shim)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_nobody_may_see_leaves_no_trace(rng, value):
    arguments = qkv(rng, 2, 20, 70, 4, 2) | {"seqused_k": integers(33, 64), "causal": True}
    poisoned = dict(arguments)
    for name in ("k", "v"):
        copy = np.array(arguments[name])
        copy[0, 33:] = copy[1, 64:] = value
        poisoned[name] = mx.array(copy)
    for got, want in zip(forward(poisoned), forward(arguments), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_masked_key_leaves_no_trace(rng, value):
    arguments = qkv(rng, 1, 40, 40, 2, 1)
    k = np.array(arguments["k"])
    k[0, 30] = value
    visible = np.arange(40) != 30
    masks = {"attn_mask": mx.array(np.broadcast_to(visible, (1, 1, 40, 40)))}
    out, lse = forward(arguments | {"k": mx.array(k)} | masks)
    want = expected(arguments | masks)
    assert error(out, want.out) < FORWARD_TOLERANCE
    assert error(lse, want.lse) < LSE_TOLERANCE * 10
    causal, _ = forward(arguments | {"k": mx.array(k), "causal": True})
    assert np.all(np.isfinite(causal[:, :30]))


def test_nan_in_a_visible_key_is_not_hidden(rng):
    arguments = qkv(rng, 1, 20, 20, 1, 1)
    k = np.array(arguments["k"])
    k[0, 5] = np.nan
    out, _ = forward(arguments | {"k": mx.array(k), "causal": True})
    assert np.all(np.isnan(out[:, 5:]))
    assert np.all(np.isfinite(out[:, :5]))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("page_size", [1, 3, 16, 128])
def test_keys_in_pages(rng, shim, page_size, dtype):
    """Pages in any order, and one that does not exist: its keys are invisible."""
    lengths_q, lengths_k = [40, 33], [70, 65]
    blocks = -(-max(lengths_k) // page_size)
    pages = 2 * blocks + 1
    table = rng.permutation(pages)[: 2 * blocks].reshape(2, blocks).astype(np.int32)
    k, v = (normal(rng, pages, page_size, 2, 32, dtype=dtype) for _ in range(2))
    packed = packed_qkv(rng, lengths_q, lengths_k, dtype=dtype) | {"causal": True}
    missing = 2 // page_size
    visible = np.ones((2, 1, 40, 70), bool)
    visible[1, :, :, missing * page_size : (missing + 1) * page_size] = False
    rows = [(table[b, j // page_size], j % page_size) for b in range(2) for j in range(lengths_k[b])]
    gathered = {name: mx.stack([x[int(page), j] for page, j in rows]) for name, x in (("k", k), ("v", v))}
    want = expected(packed | gathered | {"attn_mask": mx.array(visible)})
    table[1, missing] = -1
    out, lse = forward(packed | {"k": k, "v": v, "block_table": mx.array(table)}, shim)
    assert_close("lse", lse, want.lse, LSE_TOLERANCE)
    assert_close("out", out, want.out, {mx.float32: FORWARD_TOLERANCE, mx.float16: 2e-3, mx.bfloat16: 1e-2}[dtype])


def assert_prefilled(module: Any) -> None:
    assert any("flash_attn_forward" in report["function"] for report in module.reports())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("page_size", [None, 16])
def test_prefill_over_a_cache(rng, shim, page_size, dtype):
    """Rows of a cache in any order, each behind its own padding."""
    arguments = cache_call(rng, 2, 40, 90, 8, 2, 64, rows=3, dtype=dtype)
    arguments |= {"cache_batch_idx": integers(2, 0), "cache_leftpad": integers(3, 11), "cache_seqlens": integers(70, 90)}
    kvcache_support.check((page(rng, arguments, page_size) if page_size else arguments) | {"causal": True})
    assert_prefilled(shim)


@pytest.mark.parametrize("dims", [(64, 64), (192, 256), (256, 256)], ids=str)
@pytest.mark.parametrize("format_", kvcache_quantised.FORMATS)
def test_prefill_over_codes(rng, shim, format_, dims):
    call = cache_call(rng, 1, 40, 70, 4, 1, *dims, dtype=mx.float16) | {"causal": True}
    kvcache_quantised.check(kvcache_quantised.quantised(call, format_))
    assert_prefilled(shim)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("dims", [(32, 32), (64, 128), (64, 256), (256, 256)], ids=str)
def test_values_that_are_scored_too(rng, shim, dims, dtype):
    call = cache_call(rng, 1, 36, 70, 4, 1, *dims, dtype=dtype)
    kvcache_support.check(call | {"qv": normal(rng, 1, 36, 4, dims[1], dtype=dtype), "causal": True})
    assert_prefilled(shim)


@pytest.mark.parametrize("features", combinations.sample(24, seed=7), ids=combinations.name_of)
def test_features_together(rng, shim, features):
    check(combinations.build(rng, features), shim)


def test_results_do_not_depend_on_the_order_of_simdgroups(rng):
    arguments = qkv(rng, 1, 70, 90, 4, 2, 192, dtype=mx.float16) | {"causal": True}
    results = []
    for seed in (1, 2):
        with metal_graph("fast", seed):
            results.append(forward(arguments))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)  # the seed also moves exp2 by a few ulp


def test_a_long_call(rng):
    with metal_graph("fast") as module:
        module.clear_reports()
        check(qkv(rng, 1, 1024, 1024, 2, 1, 128, dtype=mx.float16) | {"causal": True}, module)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n  "
AFTER_BARRIERS = ["if (loads_early && !scores_values) next_v.load", "if (loads_early) next_k.load"]


@pytest.mark.parametrize("step", AFTER_BARRIERS)
def test_both_barriers_of_the_loop_are_needed(rng, step):
    arguments = qkv(rng, 1, 40, 100, 2, 1, 64, dtype=mx.float16)
    with (
        metal_graph("hooks", bugs={"flash_attn_forward": (BARRIER + step, step)}),
        pytest.raises(RuntimeError, match=r"^(race|uninitialised)"),
    ):
        forward(arguments)
