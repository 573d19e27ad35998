"""Decode calls of each implementation: a list of them, one for each cache of a pool."""

from __future__ import annotations

import importlib.util
from typing import Any

import mlx.core as mx
import numpy as np

import onnxruntime_peer
import openvino_peer
from cache_pool import CachePool
from cases import INT8, DecodeCase
from timing import Call

PEERS = ("sdpa", "torch", onnxruntime_peer.NAME, openvino_peer.NAME)


def _query(case: DecodeCase, *axes: int) -> mx.array:
    values = np.random.default_rng(1).standard_normal((case.batch, *axes, case.head_dim), dtype=np.float32)
    q = mx.array(values).astype(getattr(mx, case.query_dtype))
    mx.eval(q)
    return q


def _attend(case: DecodeCase, cache: list[mx.array], block_table: mx.array | None = None) -> Call:
    from flash_attn import flash_attn_with_kvcache

    q = _query(case, 1, case.heads)
    lengths = mx.full((case.batch,), case.length, dtype=mx.int32)
    mx.eval(lengths)
    k, v, *scales = cache
    options: dict[str, Any] = dict(zip(("k_scale", "v_scale"), scales, strict=True)) if scales else {}
    options |= {"cache_seqlens": lengths, "block_table": block_table, "causal": True}
    return lambda: mx.eval(flash_attn_with_kvcache(q, k, v, **options))


def ours(case: DecodeCase, pool: CachePool) -> list[Call]:
    return [_attend(case, pool.cache(case, index)) for index in range(pool.caches(case))]


def ours_paged(case: DecodeCase, pool: CachePool, page_size: int) -> list[Call]:
    """The same caches, each through a table of its pages in random order."""
    pages = pool.pages(page_size)
    blocks = case.tokens // page_size
    rng = np.random.default_rng(2)
    tables = [
        mx.array((index * blocks + rng.permutation(blocks)).astype(np.int32).reshape(case.batch, -1))
        for index in range(pool.caches(case))
    ]
    mx.eval(tables)
    return [_attend(case, pages, table) for table in tables]


def mlx_sdpa(case: DecodeCase, pool: CachePool) -> list[Call]:
    """mx.fast.scaled_dot_product_attention, on caches already in the layout that it likes."""
    q = _query(case, case.heads, 1)
    scale = case.head_dim**-0.5

    def call(k: mx.array, v: mx.array) -> Call:
        return lambda: mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale))

    return [call(*pool.cache(case, index, heads_first=True)) for index in range(pool.caches(case))]


def pytorch(case: DecodeCase, pool: CachePool, threads: int) -> list[Call]:
    """PyTorch's scaled_dot_product_attention, on the same memory and in the same layout."""
    import torch

    torch.set_num_threads(threads)
    q = torch.from_dlpack(_query(case, case.heads, 1))

    @torch.inference_mode()
    def attend(k: torch.Tensor, v: torch.Tensor) -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=case.heads != case.heads_k)

    def call(k: mx.array, v: mx.array) -> Call:
        keys, values = torch.from_dlpack(k), torch.from_dlpack(v)
        return lambda: attend(keys, values)

    return [call(*pool.cache(case, index, heads_first=True)) for index in range(pool.caches(case))]


def missing(peer: str, case: DecodeCase) -> str:
    """Why a peer cannot do the case; empty when it can."""
    if peer == onnxruntime_peer.NAME:
        return onnxruntime_peer.decode_missing(case)
    if peer == openvino_peer.NAME:
        return openvino_peer.decode_missing(case)
    if peer == "torch" and importlib.util.find_spec("torch") is None:
        return "not installed (make bench-peers)"
    return "no int8 cache" if case.dtype == INT8 else ""


def prepare(peer: str, case: DecodeCase, pool: CachePool, threads: int) -> list[Call]:
    if peer == "sdpa":
        return mlx_sdpa(case, pool)
    if peer == "torch":
        return pytorch(case, pool, threads)
    if peer == onnxruntime_peer.NAME:
        return onnxruntime_peer.decode(case, pool, threads)
    return openvino_peer.decode(case, threads)
