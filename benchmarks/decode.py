"""Decode over long KV caches, whose limit is reading K and V once, and what appending a token costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx

import decode_peers
from cache_pool import CachePool
from cases import DECODE_DTYPES, INT8, DecodeCase, decode_cases
from timing import Call, Timing, first_run, interleave, median_ratio

Row = dict[str, Any]

PAGE_SIZES = (16, 128)
PAIRS = 15

APPEND_CAPACITIES = (1024, 131072)
APPEND_LIVE_TOKENS = 64  # at most: attention over so few costs next to nothing
APPEND_ROUNDS = 100


def run_decode(least_bytes: int, peers: tuple[str, ...], threads: int) -> Iterator[tuple[list[Row], dict[str, str]]]:
    """Case by case its rows, ours first, and by peer why it has none. Caches rotate through `least_bytes` or more."""
    half: CachePool | None = None
    for dtype in DECODE_DTYPES:
        pool = CachePool(dtype, least_bytes)
        for case in decode_cases(dtype):
            yield _run_case(case, pool, half if dtype == INT8 else None, peers, threads)
        half = pool if dtype == "float16" else None
        del pool
        mx.clear_cache()


def _run_case(
    case: DecodeCase, pool: CachePool, half: CachePool | None, peers: tuple[str, ...], threads: int
) -> tuple[list[Row], dict[str, str]]:
    reasons = {peer: decode_peers.missing(peer, case) for peer in peers}
    turn = itertools.count()  # of all implementations: none finds in L3 what another has just read
    calls = {"ours": _rotating(turn, decode_peers.ours(case, pool))}
    if half:
        calls["float16"] = _rotating(turn, decode_peers.ours(replace(case, dtype="float16"), half))
    for peer, reason in reasons.items():
        if not reason:
            calls[peer] = _rotating(turn, decode_peers.prepare(peer, case, pool, threads))
    timings = {name: first_run(call) for name, call in calls.items()}
    interleave(calls, timings, once_if_slow=peers, iters=5)
    float16 = timings.pop("float16", None)
    rows = [_row(case, name, timing, case.tokens * pool.bytes_a_token) for name, timing in timings.items()]
    if float16:
        rows[0]["times_float16"] = float16.seconds / timings["ours"].seconds
    rows[0]["paged_time"] = {str(page_size): _paged_time(case, pool, page_size) for page_size in PAGE_SIZES}
    return rows, {peer: reason for peer, reason in reasons.items() if reason}


def _rotating(turn: Iterator[int], calls: list[Call]) -> Call:
    return lambda: calls[next(turn) % len(calls)]()


def _paged_time(case: DecodeCase, pool: CachePool, page_size: int) -> float:
    """Over the contiguous cache's."""
    turn = itertools.count()
    paged = _rotating(turn, decode_peers.ours_paged(case, pool, page_size))
    return median_ratio(paged, _rotating(turn, decode_peers.ours(case, pool)), PAIRS)


def _row(case: DecodeCase, implementation: str, timing: Timing, nbytes: int) -> Row:
    return {
        "label": case.label, "dtype": case.dtype, "batch": case.batch, "length": case.length, "heads": case.heads,
        "heads_k": case.heads_k, "head_dim": case.head_dim, "implementation": implementation, "ms": timing.seconds * 1e3,
        "runs": timing.runs, "once": timing.runs == 1, "gbs": nbytes / timing.seconds * 1e-9,
        "mlx_peak_mib": timing.peak.mlx_bytes / 2**20, "times_float16": None, "paged_time": None,
    }  # fmt: skip


def measure_append() -> dict[str, float]:
    """Microseconds of a step that appends one token, by the cache's capacity."""
    calls = {str(capacity): _append_call(capacity) for capacity in APPEND_CAPACITIES}
    timings = {name: first_run(call) for name, call in calls.items()}
    interleave(calls, timings, once_if_slow=(), iters=APPEND_ROUNDS)
    return {name: timing.seconds * 1e6 for name, timing in timings.items()}


def _append_call(capacity: int, heads: int = 8, head_dim: int = 128) -> Call:
    from flash_attn import flash_attn_with_kvcache

    k_cache, v_cache = (mx.zeros((1, capacity, heads, head_dim), dtype=mx.float16) for _ in range(2))
    q, k, v = (mx.ones((1, 1, heads, head_dim), dtype=mx.float16) for _ in range(3))
    mx.eval(k_cache, v_cache, q, k, v)
    step = itertools.count()

    def append() -> None:
        length = next(step) % APPEND_LIVE_TOKENS
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=length, causal=True)
        mx.eval(out, k_cache, v_cache)

    return append
