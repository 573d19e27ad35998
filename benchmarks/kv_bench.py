"""Time and memory of a contiguous KV cache, with room for the longest sequence, and of a paged one, with the pages that live
tokens need."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from case import KvConfig
from timing import Call, first_run, interleave

Row = dict[str, Any]

COLUMNS = ("Config", "Contig (ms)", "Paged (ms)", "Speedup", "Contig MiB", "Paged MiB", "Memory savings")


def kv_configs(
    batch_sizes: list[int], live_lengths: list[int], capacities: list[int], page_sizes: list[int], **shape: Any
) -> list[KvConfig]:
    """Every combination whose live tokens fit the capacity."""
    return [
        KvConfig(batch, live, capacity, page_size, **shape)
        for batch, live, capacity, page_size in itertools.product(batch_sizes, live_lengths, capacities, page_sizes)
        if live <= capacity
    ]


@dataclass(frozen=True)
class Caches:
    """The same tokens twice."""

    contiguous: list[mx.array]  # k, v (batch, capacity, heads_k, head_dim)
    paged: list[mx.array]  # k, v (pages, page_size, heads_k, head_dim)
    block_table: mx.array  # (batch, blocks) int32: pages in random order


def make_caches(config: KvConfig) -> Caches:
    rng = np.random.default_rng(0)
    dtype = getattr(mx, config.dtype)
    table = rng.permutation(config.batch * config.blocks).astype(np.int32)
    contiguous, paged = [], []
    for _ in ("k", "v"):
        live = rng.standard_normal((config.batch, config.live, config.heads_k, config.head_dim), dtype=np.float32)
        whole_pages = _padded(live, config.blocks * config.page_size).reshape(-1, config.page_size, *live.shape[2:])
        pages = np.empty_like(whole_pages)
        pages[table] = whole_pages
        contiguous.append(mx.array(_padded(live, config.capacity)).astype(dtype))
        paged.append(mx.array(pages).astype(dtype))
    caches = Caches(contiguous, paged, mx.array(table.reshape(config.batch, config.blocks)))
    mx.eval(caches.contiguous, caches.paged, caches.block_table)
    return caches


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    """With zeros along axis 1."""
    return np.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def run_kv_config(config: KvConfig, iters: int) -> Row:
    from flash_attn import flash_attn_with_kvcache

    caches = make_caches(config)
    shape = (config.batch, config.seqlen_q, config.heads, config.head_dim)
    q = mx.array(np.random.default_rng(1).standard_normal(shape, dtype=np.float32)).astype(getattr(mx, config.dtype))
    lengths = mx.full((config.batch,), config.live, dtype=mx.int32)
    mx.eval(q, lengths)

    def attend(cache: list[mx.array], block_table: mx.array | None = None) -> mx.array:
        return flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths, block_table=block_table, causal=True)

    if not mx.allclose(attend(caches.contiguous), attend(caches.paged, caches.block_table), rtol=1e-2, atol=1e-2).item():
        raise RuntimeError(f"{config.label}: the contiguous and the paged cache give different results")
    calls: dict[str, Call] = {
        "contiguous": lambda: mx.eval(attend(caches.contiguous)),
        "paged": lambda: mx.eval(attend(caches.paged, caches.block_table)),
    }
    timings = {name: first_run(call) for name, call in calls.items()}
    interleave(calls, timings, once_if_slow=(), iters=iters)
    return {
        "config": config.label, "dtype": config.dtype, "seqlen_q": config.seqlen_q,
        "contiguous_ms": timings["contiguous"].seconds * 1e3, "paged_ms": timings["paged"].seconds * 1e3,
        "contiguous_mib": _mib(caches.contiguous), "paged_mib": _mib(caches.paged),
    }  # fmt: skip


def _mib(arrays: list[mx.array]) -> float:
    return sum(x.nbytes for x in arrays) / 2**20


def summary(row: Row) -> str:
    """One line, a cell for each of COLUMNS."""
    cells = (
        row["config"],
        f"{row['contiguous_ms']:.3f}",
        f"{row['paged_ms']:.3f}",
        f"{row['contiguous_ms'] / row['paged_ms']:.2f}x",
        f"{row['contiguous_mib']:.1f}",
        f"{row['paged_mib']:.1f}",
        f"{row['contiguous_mib'] / row['paged_mib']:.1f}x smaller",
    )
    return " | ".join(cells)
