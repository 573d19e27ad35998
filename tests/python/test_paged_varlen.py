"""flash_attn_varlen_func with a block table: the same as over keys gathered from their pages."""

from __future__ import annotations

from typing import Any

import combinations
import mlx.core as mx
import numpy as np
import pytest
from kvcache_support import assert_refused
from support import (
    DTYPES,
    FORWARD_TOLERANCE,
    LSE_TOLERANCE,
    ROUNDING,
    assert_as_precise,
    assert_close,
    expected,
    integers,
    name_of,
    normal,
    packed_qkv,
    representation_slack,
    to_numpy,
)

from flash_attn import flash_attention_mlx, flash_attn_varlen_func

LENGTHS_Q, LENGTHS_K = [1, 33, 0, 20], [65, 40, 9, 3]
PAGE_SIZES = [1, 3, 16, 128]
SPARE = 3  # pages of nobody


def paged(rng: np.random.Generator, arguments: dict[str, Any], page_size: int, spare: float = float("nan")) -> dict[str, Any]:
    """The same call with its keys on shuffled pages. Rows of nobody hold `spare`, entries of no page -1."""
    bounds = np.array(arguments["cu_seqlens_k"])
    lengths = np.diff(bounds)
    blocks = -(-lengths // page_size)
    pages = int(blocks.sum()) + SPARE
    order = rng.permutation(pages)
    table = np.full((len(lengths), blocks.max(initial=0) + 1), -1, np.int32)
    stored = {}
    for name in ("k", "v"):
        packed = to_numpy(arguments[name])
        pool = np.full((pages, page_size, *packed.shape[1:]), spare)
        taken = 0
        for b, count in enumerate(blocks):
            table[b, :count] = order[taken : taken + count]
            taken += count
            for j in range(lengths[b]):
                pool[table[b, j // page_size], j % page_size] = packed[bounds[b] + j]
        stored[name] = mx.array(pool.astype(np.float32)).astype(arguments[name].dtype)
    return arguments | stored | {"block_table": mx.array(table)}


def results(arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    out, lse = flash_attn_varlen_func(**arguments, return_softmax_lse=True)
    assert (out.dtype, lse.dtype) == (arguments["q"].dtype, mx.float32)
    return to_numpy(out), to_numpy(lse)


def check(rng: np.random.Generator, arguments: dict[str, Any], page_size: int) -> None:
    out, lse = results(paged(rng, arguments, page_size))
    want = expected(arguments)
    assert_close("lse", lse, want.lse, LSE_TOLERANCE)
    dtype = arguments["q"].dtype
    if dtype == mx.float32:
        assert_close("out", out, want.out, FORWARD_TOLERANCE)
        return
    rounding = ROUNDING[dtype]
    slack = representation_slack(want.out, rounding)
    assert_as_precise("out", out, want.out, expected(arguments, rounding=rounding).out, rounding, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (9, 4)}], ids=str)
def test_pages_hold_the_same_keys(rng, options, page_size, dtype):
    check(rng, packed_qkv(rng, LENGTHS_Q, LENGTHS_K, dtype=dtype) | options, page_size)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize(("dim", "dim_v"), [(7, 5), (64, 128), (192, 128), (256, 256)])
def test_heads_and_head_dims(rng, dim, dim_v, heads, page_size):
    check(rng, packed_qkv(rng, [3, 40], [50, 41], *heads, dim, dim_v) | {"causal": True}, page_size)


@pytest.mark.parametrize("lengths_q", [[1, 1, 1, 1], [70, 2, 3, 1], [200, 1, 0, 0]], ids=str)
def test_decoding_and_prefilling_sequences_together(rng, lengths_q):
    check(rng, packed_qkv(rng, lengths_q, [200, 2, 3, 90]) | {"causal": True}, 16)


def features_of_packed_calls() -> list[frozenset[str]]:
    return list(dict.fromkeys(features | {"varlen"} for features in combinations.sample(60, seed=21)))


@pytest.mark.parametrize("features", features_of_packed_calls(), ids=combinations.name_of)
def test_features_combine(rng, features):
    check(rng, combinations.build(rng, features), int(rng.choice(PAGE_SIZES)))


@pytest.mark.parametrize("features", features_of_packed_calls()[:15], ids=combinations.name_of)
def test_the_reference_combines_them_too(rng, features, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "1")
    check(rng, combinations.build(rng, features), 3)


def test_seqused_k_replaces_the_lengths_of_cu_seqlens_k(rng):
    """cu_seqlens_k may then say what it likes: more tokens than the pool has."""
    arguments = paged(rng, packed_qkv(rng, [4, 9], [30, 17]), 8)
    want = results(arguments)
    used = arguments | {"cu_seqlens_k": integers(0, 32, 56), "seqused_k": integers(30, 17), "max_seqlen_k": 32}
    for got, value in zip(results(used), want, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-6)


def test_lengths_may_add_up_to_more_than_the_pool_when_pages_are_shared(rng):
    k, v = normal(rng, 4, 8, 2, 32), normal(rng, 4, 8, 2, 32)
    q = normal(rng, 6, 4, 32)
    bounds = {
        "cu_seqlens_q": integers(0, 2, 4, 6),
        "cu_seqlens_k": integers(0, 30, 60, 77),
        "max_seqlen_q": 2,
        "max_seqlen_k": 30,
    }
    table = np.array([[3, 1, 0, 2], [3, 1, 2, 0], [3, 1, 0, -1]], np.int32)
    gathered = {
        name: mx.concatenate([x[mx.array(row[row >= 0])].flatten(0, 1)[:n] for row, n in zip(table, (30, 30, 17), strict=True)])
        for name, x in (("k", k), ("v", v))
    }
    got = results({"q": q, "k": k, "v": v, **bounds, "block_table": mx.array(table), "causal": True})
    want = results({"q": q, **gathered, **bounds, "causal": True})
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("lengths", [[40, 40], [40, 23]], ids=str)
def test_the_routed_function_reads_pages_for_dense_queries(rng, lengths):
    arguments = paged(rng, packed_qkv(rng, [5, 5], lengths) | {"causal": True}, 8)
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    table = arguments["block_table"][:, :5]
    used = None if lengths == [40, 40] else integers(*lengths)
    out = flash_attention_mlx(q.reshape(2, 5, 4, 32), k, v, block_table=table, seqused_k=used, causal=True)
    np.testing.assert_allclose(to_numpy(out).reshape(10, 4, 32), results(arguments)[0], atol=1e-5)


@pytest.mark.parametrize("seqlen_q", [1, 30])
def test_a_page_that_is_not_there_hides_its_keys_and_keeps_its_positions(rng, seqlen_q):
    arguments = packed_qkv(rng, [seqlen_q, seqlen_q], [60, 33]) | {"alibi_slopes": normal(rng, 4), "causal": True}
    holes = paged(rng, arguments, 8)
    table = np.array(holes["block_table"])
    table[0, [0, 5]] = -1
    table[1, 2] = -1
    seen = np.ones((2, 1, 1, 60), bool)
    seen[0, ..., :8] = seen[0, ..., 40:48] = seen[1, ..., 16:24] = False
    want = expected(arguments | {"attn_mask": mx.array(seen)})
    out, lse = results(holes | {"block_table": mx.array(table)})
    np.testing.assert_allclose(out, want.out, atol=2e-5)
    np.testing.assert_allclose(lse, want.lse, atol=2e-5)


def test_any_number_of_splits_agrees(rng):
    arguments = paged(rng, packed_qkv(rng, [1, 5], [500, 301]), 16)
    want = results(arguments | {"num_splits": 1})
    for splits in (0, 3, 200):
        for a, b in zip(results(arguments | {"num_splits": splits}), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_pages_are_read_in_place(rng):
    arguments = paged(rng, packed_qkv(rng, [1, 40], [3000, 1000], dim=64), 16, spare=0.0)
    mx.eval(arguments)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(flash_attn_varlen_func(**arguments))
    assert mx.get_peak_memory() - before <= 2**17 < arguments["k"].nbytes // 8


def test_compile_changes_nothing(rng):
    arguments = paged(rng, packed_qkv(rng, [3, 9], [30, 17]) | {"causal": True}, 8)
    names = ("q", "k", "v", "block_table", "cu_seqlens_k")
    compiled = mx.compile(lambda *x: flash_attn_varlen_func(**(arguments | dict(zip(names, x, strict=True)))))
    np.testing.assert_allclose(to_numpy(compiled(*(arguments[name] for name in names))), results(arguments)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_there_is_no_gradient(rng, name):
    arguments = paged(rng, packed_qkv(rng, [3, 9], [30, 17]), 8)
    with pytest.raises(NotImplementedError, match="gradient"):
        mx.grad(lambda x: flash_attn_varlen_func(**(arguments | {name: x})).sum())(arguments[name])


# ---- what is refused, and what comes too late for that

Q, POOL = mx.zeros((5, 4, 32)), mx.zeros((8, 4, 2, 32))
GOOD = {
    "q": Q,
    "k": POOL,
    "v": POOL,
    "cu_seqlens_q": integers(0, 2, 5),
    "cu_seqlens_k": integers(0, 9, 20),
    "max_seqlen_q": 3,
    "max_seqlen_k": 12,
    "block_table": integers(*range(6)).reshape(2, 3),
}
BAD = {
    "table of 64 bits": ({"block_table": mx.zeros((2, 3), mx.int64)}, TypeError, "block_table"),
    "table as a list": ({"block_table": [[0]]}, TypeError, "block_table"),
    "table of rank 1": ({"block_table": integers(0, 1)}, ValueError, "block_table"),
    "table of another batch": ({"block_table": integers(0, 1, 2)[None]}, ValueError, "block_table"),
    "keys that are not paged": ({"k": POOL[0], "v": POOL[0]}, ValueError, "k"),
    "page size of v": ({"v": POOL[:, :3]}, ValueError, "v"),
    "pages of v": ({"v": POOL[:3]}, ValueError, "v"),
    "head dim of k": ({"k": POOL[..., :16]}, ValueError, "k"),
    "dtype of v": ({"v": POOL.astype(mx.float16)}, TypeError, "v"),
    "a page that is not there": ({"block_table": integers(0, 1, 2, 3, 8, 5).reshape(2, 3)}, ValueError, "block_table"),
    "a page below -1": ({"block_table": integers(0, 1, 2, -3, 4, 5).reshape(2, 3)}, ValueError, "block_table"),
    "a length past the table": ({"cu_seqlens_k": integers(0, 13, 20), "max_seqlen_k": 13}, ValueError, "cu_seqlens_k"),
    "seqused past the table": ({"seqused_k": integers(13, 1), "max_seqlen_k": 13}, ValueError, "seqused_k"),
    "negative seqused": ({"seqused_k": integers(-1, 1)}, ValueError, "seqused_k"),
    "bounds that fall": ({"cu_seqlens_k": integers(0, 9, 8)}, ValueError, "cu_seqlens_k"),
}


def test_the_call_that_is_spoilt_here_is_good():
    mx.eval(flash_attn_varlen_func(**GOOD))


@pytest.mark.parametrize(("change", "error", "argument"), BAD.values(), ids=BAD.keys())
def test_bad_calls_are_refused(change, error, argument):
    mx.eval([x for x in (*GOOD.values(), *change.values()) if isinstance(x, mx.array)])
    assert_refused(error, argument, flash_attn_varlen_func, **(GOOD | change))


@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_a_hostile_table_that_comes_late_hides_what_is_no_page(rng, seqlen_q, page_size, path, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "1" if path == "reference" else "0")
    good = paged(rng, packed_qkv(rng, [seqlen_q] * 3, [50, 20, 33]) | {"causal": True}, page_size, spare=0.0)
    pages = len(good["k"])
    for _ in range(8):
        table = np.array(good["block_table"])
        anything = rng.choice([-(2**31), -2, pages, pages + 1, 2**20, 2**31 - 1], table.shape)
        table = np.where(rng.random(table.shape) < 0.4, anything, table).astype(np.int32)
        holes = np.where((table < 0) | (table >= pages), -1, table)
        for got, want in zip(
            results(good | {"block_table": mx.array(table) + 0}), results(good | {"block_table": mx.array(holes)}), strict=True
        ):
            np.testing.assert_array_equal(got, want)


def test_hostile_lengths_that_come_late_read_nothing_outside(rng):
    good = paged(rng, packed_qkv(rng, [4, 4, 4], [50, 20, 33]) | {"causal": True}, 8, spare=0.0)
    for _ in range(30):
        values = rng.choice([-(2**31), -1, 0, 3, 50, 1000, 2**30, 2**31 - 1], (2, 4)).astype(np.int32)
        late = {"cu_seqlens_k": mx.array(values[0]) + 0}
        if rng.integers(2):
            late["seqused_k"] = mx.array(values[1, :3]) + 0
        out, lse = results(good | late)
        assert np.all(np.isfinite(out))
        assert not np.any(np.isnan(lse))
