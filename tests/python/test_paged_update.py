"""update_paged_kv_cache stores new tokens in their pages; validate_paged_kv_params says what is wrong with a table."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from kvcache_support import CACHES, address, assert_refused, cache_call, call_of, page, run
from support import DTYPES, integers, name_of, to_numpy

from flash_attn import flash_attn_with_kvcache
from flash_attn.flash_attn_mlx.paged_cache import update_paged_kv_cache
from flash_attn.flash_attn_mlx.utils import validate_paged_kv_params

PAGE_SIZES = [1, 3, 16, 128]
NAMES = (*CACHES, "k", "v", "block_table", "cache_seqlens")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


@each_dtype
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_update_stores_new_tokens_in_their_pages(rng, page_size, dtype):
    arguments = page(rng, cache_call(rng, 3, 1, 60, dim=24, dim_v=16, seqlen_new=7, dtype=dtype), page_size)
    want = call_of(arguments).appended()
    lengths = update_paged_kv_cache(*(arguments[name] for name in NAMES))
    assert lengths.dtype == mx.int32
    np.testing.assert_array_equal(np.array(lengths), np.array(arguments["cache_seqlens"]) + 7)
    for name, cache in zip(CACHES, want, strict=True):
        np.testing.assert_array_equal(to_numpy(arguments[name]), cache)


def test_update_then_attention_is_one_call_with_new_tokens(rng):
    arguments = page(rng, cache_call(rng, 2, 4, 60, seqlen_new=4) | {"causal": True}, 8)
    want = run(arguments)
    lengths = update_paged_kv_cache(*(arguments[name] for name in NAMES))
    out = flash_attn_with_kvcache(**(arguments | {"k": None, "v": None, "cache_seqlens": lengths}))
    np.testing.assert_allclose(to_numpy(out), want.out, atol=1e-6)


def test_update_drops_tokens_of_a_page_that_is_not_there_but_counts_them(rng):
    arguments = page(rng, cache_call(rng, 2, 1, 32, seqlen_new=4) | {"cache_seqlens": integers(14, 20)}, 8)
    table = np.array(arguments["block_table"])
    table[0, 2] = -1
    arguments["block_table"] = mx.array(table)
    want = call_of(arguments).appended()
    lengths = update_paged_kv_cache(
        arguments["k_cache"],
        arguments["v_cache"],
        arguments["k"],
        arguments["v"],
        mx.array(table) + 0,
        arguments["cache_seqlens"],
    )
    assert lengths.tolist() == [18, 24]
    for name, cache in zip(CACHES, want, strict=True):
        np.testing.assert_array_equal(to_numpy(arguments[name]), cache)


def test_update_writes_into_the_callers_buffers_and_copies_nothing(rng):
    arguments = page(rng, cache_call(rng, 2, 1, 4096, dim=64, seqlen_new=3) | {"cache_seqlens": integers(7, 900)}, 16)
    mx.eval(arguments)
    mx.clear_cache()
    before = [address(arguments[name]) for name in CACHES]
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(50):
        arguments["cache_seqlens"] = update_paged_kv_cache(*(arguments[name] for name in NAMES))
    mx.eval(arguments["cache_seqlens"], *(arguments[name] for name in CACHES))
    assert mx.get_peak_memory() - active <= 2**17 < arguments["k_cache"].nbytes
    assert [address(arguments[name]) for name in CACHES] == before
    assert arguments["cache_seqlens"].tolist() == [157, 1050]


def test_a_hostile_table_that_comes_late_writes_only_pages_that_it_names(rng):
    for _ in range(20):
        good = page(rng, cache_call(rng, 3, 1, 48, seqlen_new=3), 4)
        pages = len(good["k_cache"])
        guarded = pages - 3 + np.arange(3)
        before = [to_numpy(good[name])[guarded] for name in CACHES]
        table = rng.choice([-(2**31), -2, -1, 0, 1, pages, 2**20, 2**31 - 1], good["block_table"].shape).astype(np.int32)
        late = rng.choice([-(2**31), -1, 0, 3, 47, 48, 1000, 2**31 - 1], 3).astype(np.int32)
        lengths = update_paged_kv_cache(*(good[name] for name in NAMES[:4]), mx.array(table) + 0, mx.array(late) + 0)
        mx.eval(lengths, good["k_cache"], good["v_cache"])
        for name, value in zip(CACHES, before, strict=True):
            np.testing.assert_array_equal(to_numpy(good[name])[guarded], value)


# ---- what is refused

K, V = mx.zeros((2, 3, 2, 32)), mx.zeros((2, 3, 2, 16))
LENGTHS = integers(4, 7)
POOL = {"k_cache": mx.zeros((8, 4, 2, 32)), "v_cache": mx.zeros((8, 4, 2, 16))}
TABLE = integers(*range(6)).reshape(2, 3)
PAGING = POOL | {"block_table": TABLE, "cache_seqlens": integers(1, 4)}
mx.eval(PAGING)


def table_of(*pages: int) -> dict[str, mx.array]:
    return {"block_table": integers(*pages).reshape(2, 3)}


WRONG_PAGES = {
    "a page that is not there": (table_of(0, 1, 2, 3, 8, 5) | {"cache_seqlens": integers(1, 9)}, 0, "block_table"),
    "a page below -1": (table_of(0, 1, 2, 3, -7, 5) | {"cache_seqlens": integers(1, 9)}, 0, "block_table"),
    "a length past the table": ({"cache_seqlens": integers(1, 13)}, 0, "cache_seqlens"),
    "a negative length": ({"cache_seqlens": integers(1, -1)}, 0, "cache_seqlens"),
    "new tokens past the table": ({"cache_seqlens": integers(1, 10)}, 3, "cache_seqlens"),
    "new tokens on a page of -1": (table_of(0, 1, 2, 3, -1, 5), 1, "block_table"),
}
WRONG_POOLS = {
    "table of 64 bits": ({"block_table": TABLE.astype(mx.int64)}, TypeError, "block_table"),
    "table of rank 1": ({"block_table": TABLE[0]}, ValueError, "block_table"),
    "table of another batch": ({"block_table": TABLE[:1]}, ValueError, "cache_seqlens"),
    "lengths of 64 bits": ({"cache_seqlens": LENGTHS.astype(mx.int64)}, TypeError, "cache_seqlens"),
    "v_cache of another page size": ({"v_cache": POOL["v_cache"][:, :3]}, ValueError, "v_cache"),
    "v_cache of another number of pages": ({"v_cache": POOL["v_cache"][:3]}, ValueError, "v_cache"),
    "v_cache of other heads": ({"v_cache": POOL["v_cache"][:, :, :1]}, ValueError, "v_cache"),
    "k_cache of rank 3": ({"k_cache": POOL["k_cache"][0]}, ValueError, "k_cache"),
    "v_cache of another dtype": ({"v_cache": POOL["v_cache"].astype(mx.float16)}, TypeError, "v_cache"),
    "no k_cache": ({"k_cache": None}, TypeError, "k_cache"),
    "negative seqlen_new": ({"seqlen_new": -1}, ValueError, "seqlen_new"),
    "fractional seqlen_new": ({"seqlen_new": 1.5}, TypeError, "seqlen_new"),
}
WRONG_UPDATES = {
    "head dim of new_k": ({"new_k": K[..., :16]}, ValueError, "new_k"),
    "head dim of new_v": ({"new_v": V[..., :8]}, ValueError, "new_v"),
    "batch of new_k": ({"new_k": K[:1]}, ValueError, "new_k"),
    "seqlen of new_v": ({"new_v": V[:, :1]}, ValueError, "new_v"),
    "dtype of new_k": ({"new_k": K.astype(mx.float16)}, TypeError, "new_k"),
    "table of 64 bits": ({"block_table": TABLE.astype(mx.int64)}, TypeError, "block_table"),
    "no lengths": ({"cache_seqlens": None}, TypeError, "cache_seqlens"),
}


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize(("change", "seqlen_new", "argument"), WRONG_PAGES.values(), ids=WRONG_PAGES.keys())
def test_validation_refuses_values_and_evaluates_them_if_it_must(change, seqlen_new, argument, evaluated):
    change = {name: x + 0 for name, x in change.items()}
    if evaluated:
        mx.eval(change)
    assert_refused(ValueError, argument, validate_paged_kv_params, **(PAGING | change), seqlen_new=seqlen_new)


@pytest.mark.parametrize(("change", "error", "argument"), WRONG_POOLS.values(), ids=WRONG_POOLS.keys())
def test_validation_refuses_shapes_and_types(change, error, argument):
    assert_refused(error, argument, validate_paged_kv_params, **(PAGING | change))


def test_validation_lets_good_calls_pass():
    caches = list(POOL.values())
    assert validate_paged_kv_params(*caches, TABLE, LENGTHS) is None
    assert validate_paged_kv_params(*caches, TABLE, integers(12, 0)) is None
    assert validate_paged_kv_params(*caches, TABLE, integers(9, 9), seqlen_new=3) is None
    holes = table_of(0, -1, 2, 3, 4, -1)["block_table"]
    assert validate_paged_kv_params(*caches, holes, integers(8, 7), seqlen_new=1) is None


@pytest.mark.parametrize(("change", "error", "argument"), WRONG_UPDATES.values(), ids=WRONG_UPDATES.keys())
def test_bad_updates(change, error, argument):
    assert_refused(error, argument, update_paged_kv_cache, **(PAGING | {"new_k": K, "new_v": V} | change))


@pytest.mark.parametrize(("change", "seqlen_new", "argument"), WRONG_PAGES.values(), ids=WRONG_PAGES.keys())
def test_bad_values_of_an_update(change, seqlen_new, argument):
    mx.eval(change)
    assert_refused(ValueError, argument, update_paged_kv_cache, **(PAGING | {"new_k": K, "new_v": V} | change))
