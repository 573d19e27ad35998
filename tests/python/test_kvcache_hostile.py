"""Lengths, tables and indices that no check could see, since they come late: nothing outside a sequence is read or written."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kvcache_support import CACHES, cache_call, copied, page, rotary
from support import integers

from flash_attn import flash_attn_with_kvcache

EXTREMES = np.array([-(2**31), -(2**20), -65, -2, -1, 0, 3, 63, 64, 65, 1000, 2**20, 2**30, 2**31 - 1], np.int64)


def hostile(rng: np.random.Generator, shape: tuple[int, ...]) -> mx.array:
    """Any int32, not evaluated."""
    anything = np.where(rng.random(shape) < 0.5, rng.integers(-(2**31), 2**31, shape), rng.choice(EXTREMES, shape))
    return mx.array(anything.astype(np.int32)) + 0


def bystander(arguments: dict[str, Any], rows: int) -> dict[str, Any]:
    """A call's caches with `rows` of them, filled with 7, that no sequence of the call owns."""
    return arguments | {
        name: mx.concatenate([arguments[name], mx.full((rows, *arguments[name].shape[1:]), 7.0)]) for name in CACHES
    }


def assert_survived(arguments: dict[str, Any], guarded: int) -> np.ndarray:
    """No crash, no NaN from finite input, and the last `guarded` rows or pages keep their values. Returns out."""
    own = copied(arguments)
    out, lse = flash_attn_with_kvcache(**own, return_softmax_lse=True)
    mx.eval(out, lse, own["k_cache"], own["v_cache"])
    assert np.all(np.isfinite(np.array(out)))
    assert not np.any(np.isnan(np.array(lse)))
    for name in CACHES:
        assert np.all(np.array(own[name][-guarded:]) == 7.0)
        assert np.all(np.isfinite(np.array(own[name])))
    return np.array(out)


HOSTILE = {
    "lengths": ("cache_seqlens",),
    "leftpad": ("cache_leftpad",),
    "both lengths": ("cache_seqlens", "cache_leftpad"),
    "rotary positions": ("rotary_seqlens",),
    "bounds of queries": ("cu_seqlens_q",),
    "bounds of new keys": ("cu_seqlens_k_new",),
    "all": ("cache_seqlens", "cache_leftpad", "rotary_seqlens", "cu_seqlens_q", "cu_seqlens_k_new"),
}


@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("names", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_lengths_and_bounds_stay_inside_their_sequences(rng, names, paged, path, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "1" if path == "reference" else "0")
    for _ in range(12 if path == "kernel" else 3):
        good = rotary(rng, cache_call(rng, 3, 4, 20, seqlen_new=3), 16) | {"causal": True, "cache_seqlens": integers(3, 9, 17)}
        good = bystander(page(rng, good, 4) if paged else good | {"cache_batch_idx": integers(0, 1, 2)}, 2)
        for name, tensors in (("cu_seqlens_q", ("q",)), ("cu_seqlens_k_new", ("k", "v"))):
            if name in names:
                good |= {tensor: good[tensor].flatten(0, 1) for tensor in tensors}
        if "cu_seqlens_q" in names:
            good["max_seqlen_q"] = 4
        sizes = {"cu_seqlens_q": 4, "cu_seqlens_k_new": 4}
        assert_survived(good | {name: hostile(rng, (sizes.get(name, 3),)) for name in names}, 2)


def test_a_hostile_length_of_one_sequence_does_not_change_the_others(rng):
    for _ in range(20):
        good = bystander(cache_call(rng, 3, 2, 20, seqlen_new=3) | {"causal": True, "cache_seqlens": integers(5, 9, 17)}, 1)
        good["cache_batch_idx"] = integers(0, 1, 2)
        lengths = np.array(hostile(rng, (3,)))
        lengths[[0, 2]] = 5, 17
        bad = copied(good) | {"cache_seqlens": mx.array(lengths) + 0}
        want = copied(good)
        outs = flash_attn_with_kvcache(**bad), flash_attn_with_kvcache(**want)
        for pair in (outs, *((bad[name], want[name]) for name in CACHES)):
            np.testing.assert_array_equal(*(np.array(x)[[0, 2]] for x in pair))


def test_tokens_past_the_capacity_are_dropped_and_do_not_reach_the_next_row(rng):
    arguments = bystander(cache_call(rng, 1, 1, 8, seqlen_new=5), 2) | {"cache_batch_idx": integers(0)}
    assert_survived(arguments | {"cache_seqlens": integers(6) + 0}, 2)
    own = copied(arguments) | {"cache_seqlens": integers(6) + 0}
    mx.eval(flash_attn_with_kvcache(**own))
    assert mx.array_equal(own["k_cache"][0, 6:8], arguments["k"][0, :2])
    assert mx.array_equal(own["k_cache"][0, :6], arguments["k_cache"][0, :6])


@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_hostile_block_tables_read_and_write_only_their_own_pages(rng, seqlen_q, page_size, path, monkeypatch):
    """An entry that is no page hides its keys and drops its tokens. Guarded pages are never named by the table."""
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "1" if path == "reference" else "0")
    for _ in range(10 if path == "kernel" else 3):
        good = bystander(page(rng, cache_call(rng, 3, seqlen_q, 48, seqlen_new=3), page_size), 3)
        pages = len(good["k_cache"])
        table = np.array(good["block_table"])
        bad = np.array(hostile(rng, table.shape))
        bad[(bad >= pages - 3) & (bad < pages)] = -1
        table = np.where(rng.random(table.shape) < 0.5, bad, table)
        out = assert_survived(good | {"block_table": mx.array(table) + 0}, 3)
        holes = np.where((table < 0) | (table >= pages), -1, table)
        np.testing.assert_array_equal(out, assert_survived(good | {"block_table": mx.array(holes) + 0}, 3))


@pytest.mark.parametrize("paged", [False, True])
def test_hostile_batch_indices_write_no_row(rng, paged):
    """A row that is not there: nothing seen, nothing stored."""
    for _ in range(10):
        good = cache_call(rng, 3, 2, 20, seqlen_new=3) | {"cache_seqlens": integers(3, 9, 17)}
        good = page(rng, good, 4) if paged else good
        index = np.array(hostile(rng, (3,)))
        index[(index >= 0) & (index < 3)] = -1
        own = copied(good) | {"cache_batch_idx": mx.array(index) + 0}
        out, lse = flash_attn_with_kvcache(**own, return_softmax_lse=True)
        assert np.all(np.array(out) == 0)
        assert np.all(np.array(lse) == -np.inf)
        for name in CACHES:
            assert mx.array_equal(own[name], good[name])


@pytest.mark.parametrize("format_", ["int8", "mlx4"])
def test_hostile_tables_of_quantised_caches(rng, format_):
    for _ in range(10):
        good = page(rng, cache_call(rng, 3, 2, 48, dim=64, seqlen_new=3), 4)
        if format_ == "int8":
            good |= {name: (good[name] * 30).astype(mx.int8) for name in CACHES}
            good |= {name: mx.full(good["k_cache"].shape[:3], 1 / 30) for name in ("k_scale", "v_scale")}
        else:
            good |= {name: tuple(mx.quantize(good[name], group_size=64, bits=4)) for name in CACHES}
        bad = {"block_table": hostile(rng, good["block_table"].shape), "cache_seqlens": hostile(rng, (3,))}
        assert np.all(np.isfinite(np.array(flash_attn_with_kvcache(**(good | bad)))))
