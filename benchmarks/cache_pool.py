"""KV caches for decoding, so many that no cache of the processor holds them."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
from flash_attn import PagedKVCache

from case import INT8, MLX_CODES, DecodeCase

BLOCK_TOKENS = 32768  # a multiple of every case's tokens: its caches fill whole blocks


class CachePool:
    """At least `least_bytes` of K and V in a row, of which each call reads the next stretch: none of its keys is in L3, as in a
    model whose other layers ran in between."""

    def __init__(self, dtype: str, least_bytes: int, heads_k: int = 8, head_dim: int = 128) -> None:
        rng = np.random.default_rng(0)
        block = [mx.array(rng.standard_normal((BLOCK_TOKENS, heads_k, head_dim), dtype=np.float32)) for _ in range(2)]
        parts = _in_dtype(block, dtype)
        block_bytes = sum(x.nbytes for x in parts)
        blocks = -(-least_bytes // block_bytes)
        self.dtype = dtype
        self.tokens = blocks * BLOCK_TOKENS
        self.bytes_a_token = block_bytes // BLOCK_TOKENS
        # k, v (tokens, heads_k, head_dim); of int8 also their scales (tokens, heads_k); of MLX's codes k's three parts and v's
        self.arrays = [mx.concatenate([x] * blocks) for x in parts]
        mx.eval(self.arrays)

    def moved(self) -> CachePool:
        """The same tokens from last to first, elsewhere in memory."""
        moved = copy.copy(self)
        moved.arrays = [mx.contiguous(x[::-1]) for x in self.arrays]
        mx.eval(moved.arrays)
        return moved

    def caches(self, case: DecodeCase) -> int:
        return 1 if case.in_cache else self.tokens // case.tokens

    def cache(self, case: DecodeCase, index: int, heads_first: bool = False) -> list[mx.array]:
        """Cache number `index`, part by part: views (batch, length, heads_k, ...), or the same memory as (batch, heads_k,
        length, ...)."""
        part = slice(index * case.tokens, (index + 1) * case.tokens)
        axes = (case.heads_k, case.length) if heads_first else (case.length, case.heads_k)
        views = [x[part].reshape(case.batch, *axes, *x.shape[2:]) for x in self.arrays]
        mx.eval(views)
        return views

    def paged_views(self, page_size: int) -> list[mx.array]:
        """All of it where it lies: (pages, page_size, heads_k, ...)."""
        views = [x.reshape(-1, page_size, *x.shape[1:]) for x in self.arrays]
        mx.eval(views)
        return views

    def pages(self, page_size: int) -> list[mx.array]:
        """A copy of it, as this package keeps pages."""
        k = self.arrays[0]
        cache = PagedKVCache(self.tokens // page_size, page_size, *k.shape[1:], dtype=k.dtype)
        pages = [cache.k_cache, cache.v_cache] + [x for x in (cache.k_scale, cache.v_scale) if x is not None]
        for to, content in zip(pages, self.arrays, strict=True):
            memoryview(to.reshape(-1).view(mx.uint8))[:] = memoryview(content.reshape(-1).view(mx.uint8))
        return pages


def _in_dtype(arrays: list[mx.array], dtype: str) -> list[mx.array]:
    if dtype == INT8:
        return _quantised(arrays)
    if dtype in MLX_CODES:
        return [part for x in arrays for part in mx.quantize(x.astype(mx.float16), group_size=64, bits=MLX_CODES[dtype])]
    return [x.astype(getattr(mx, dtype)) for x in arrays]


def _quantised(arrays: list[mx.array]) -> list[mx.array]:
    """The arrays in int8, then a float32 scale for each of their rows."""
    scales = [mx.abs(x).max(axis=-1) / 127.0 for x in arrays]
    return [mx.round(x / scale[..., None]).astype(mx.int8) for x, scale in zip(arrays, scales, strict=True)] + scales
