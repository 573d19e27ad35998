"""Decode over KV caches: beyond the processor's caches, where reading K and V once is the limit, and inside them; and what
appending a token costs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx

from attention import prepared_by
from cache_pool import CachePool
from case import INT8, DecodeCase
from cases import PAGE_SIZES, decode_cases
from ceilings import Reading
from peers.base import Peer
from peers.ours import paged_decode
from timing import Call, SelfTimed, Timing, first_run, interleave, median_of_rounds, ratios_of_pairs

Row = dict[str, Any]

PAIRS = 15
PLACES = 3  # in memory, for as many pairs each
LEAST_SECONDS = 3.0  # a case; shares of read are medians of its rounds
BURST = 10  # calls in a row of a case in cache, timed together

APPEND_CAPACITIES = (1024, 131072)
APPEND_LIVE_TOKENS = 64  # at most: attention over so few costs next to nothing
APPEND_ROUNDS = 100


def pools(dtypes: Collection[str], least_bytes: int) -> Iterator[tuple[CachePool, CachePool | None]]:
    """One of each dtype in turn; with int8 its yardstick, float32, whose speed in tokens it is judged by."""
    yardstick: CachePool | None = None
    for dtype in dtypes:
        pool = CachePool(dtype, least_bytes)
        if dtype == "float32" and INT8 in dtypes:
            yardstick = pool
        yield pool, yardstick if dtype == INT8 else None
        del pool
        mx.clear_cache()


def run_decode(
    pool: CachePool, yardstick: CachePool | None, peers: dict[str, Peer], chosen: Collection[str], iters: int,
    reading: Callable[[int], Reading],
) -> Iterator[tuple[list[Row], dict[str, str]]]:  # fmt: skip
    """Case by case its rows, ours first, and by peer why it has none. A loop that reads as many bytes takes turns with them."""
    for case in decode_cases(pool.dtype):
        with reading(case.tokens * pool.bytes_a_token) as read:
            yield _run_case(case, pool, yardstick, peers, chosen, iters, read)


def _run_case(
    case: DecodeCase, pool: CachePool, yardstick: CachePool | None, peers: dict[str, Peer], chosen: Collection[str], iters: int,
    read: Reading,
) -> tuple[list[Row], dict[str, str]]:  # fmt: skip
    turn = itertools.count()  # of all implementations: none finds in L3 what another has just read
    ours = peers["ours"]
    lists = {"ours": ours.decode(case, pool)}
    if yardstick:
        lists["yardstick"] = ours.decode(replace(case, dtype=yardstick.dtype), yardstick)
    others, missing = prepared_by([peers[name] for name in chosen], case, lambda peer: peer.decode(case, pool))
    calls: dict[str, Call] = {name: _rotating(turn, calls) for name, calls in (lists | others).items()}
    if case.in_cache:
        calls = {name: _Burst(call) for name, call in calls.items()}
    timings = _time(calls | {"read": read}, chosen, iters)
    reading_alone = timings.pop("read")
    base = timings.pop("yardstick", None)
    nbytes = case.tokens * pool.bytes_a_token
    rows = [_row(case, name, timing, reading_alone, nbytes) for name, timing in timings.items()]
    if base and yardstick:
        rows[0][f"times_{yardstick.dtype}"] = base.seconds / timings["ours"].seconds
    return rows, missing


def _time(calls: dict[str, Call], once_if_slow: Collection[str], iters: int) -> dict[str, Timing]:
    timings = {name: first_run(call) for name, call in calls.items()}
    interleave(calls, timings, once_if_slow=once_if_slow, iters=iters, least_seconds=LEAST_SECONDS)
    return timings


def _rotating(turn: Iterator[int], calls: list[Call]) -> Call:
    return lambda: calls[next(turn) % len(calls)]()


class _Burst(SelfTimed):
    """Of a call that is made several times in a row, the time of one."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self) -> float:
        start = time.perf_counter()
        for _ in range(BURST):
            self._call()
        return (time.perf_counter() - start) / BURST


def _row(case: DecodeCase, implementation: str, timing: Timing, read: Timing, nbytes: int) -> Row:
    return {
        "label": case.label, "dtype": case.dtype, "batch": case.batch, "length": case.length, "heads": case.heads,
        "heads_k": case.heads_k, "head_dim": case.head_dim, "heads_first": case.heads_first, "in_cache": case.in_cache,
        "implementation": implementation,
        "ms": timing.seconds * 1e3, "runs": timing.runs, "once": timing.runs == 1, "bytes": nbytes, "flops": case.flops(),
        "gbs": nbytes / timing.seconds * 1e-9, "gflops": case.flops() / timing.seconds * 1e-9,
        "read_gbs": nbytes / statistics.median(read.rounds) * 1e-9, "of_read": median_of_rounds(read, timing),
        "mlx_peak_mib": timing.peak.mlx_bytes / 2**20, "times_float32": None,
    }  # fmt: skip


def run_paged(case: DecodeCase, pool: CachePool, ours: Peer) -> Row:
    """Time in pages over the contiguous cache's, by page size and by who made the pool: this package, or MLX, in whose arrays
    memory is slower in random order. Where caches happen to lie makes several percent, so pairs are of several places."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for _ in range(PLACES):
        pool = pool.moved()
        for page_size in PAGE_SIZES:
            turn = itertools.count()
            ours_or_mlx = {"": pool.pages(page_size), ", MLX's": pool.paged_views(page_size)}
            in_pages = {
                f"pages of {page_size}{maker}": _rotating(turn, paged_decode(case, pool, page_size, pages))
                for maker, pages in ours_or_mlx.items()
            }
            contiguous = _rotating(turn, ours.decode(case, pool))
            for call in (*in_pages.values(), contiguous):
                call()
            for name, pairs in ratios_of_pairs(in_pages, contiguous, PAIRS // PLACES).items():
                ratios[name] += pairs
    medians = {name: statistics.median(pairs) for name, pairs in ratios.items()}
    return {"label": case.label, "dtype": case.dtype, "paged_time": medians}


def empty_op_seconds() -> float:
    """MLX's own cost of evaluating one operation, which no attention call can avoid."""
    one = mx.ones((1,))
    return _time({"empty": _Burst(lambda: mx.eval(mx.negative(one)))}, (), 20)["empty"].seconds


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
