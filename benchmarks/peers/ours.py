"""This package, and the same functions as compositions of MLX ops: what a user would write without a fused kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flash_attn
import mlx.core as mx
import numpy as np

from cache_pool import CachePool
from case import MLX_CODES, Case, DecodeCase
from peers.base import Inputs, Peer, decode_query
from peers.mlx_calls import mlx_call
from timing import Call


class Ours(Peer):
    name = "ours"
    title = "ours"

    def prepare(self, case: Case, x: Inputs) -> Call:
        options: dict[str, Any] = {
            "causal": case.causal, "window_size": case.window, "softcap": case.softcap, "alibi_slopes": x.alibi_slopes,
            "dropout_p": case.dropout_p, "dropout_key": x.dropout_key, "attn_mask": x.attn_mask, "return_softmax_lse": case.lse,
        }  # fmt: skip

        def forward(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array | None = None) -> list[mx.array]:
            if case.lengths:
                longest = max(case.lengths)
                got = flash_attn.flash_attn_varlen_func(
                    q, k, v, x.cu_seqlens, x.cu_seqlens, longest, longest, learnable_sink=sinks, **options
                )
            else:
                got = flash_attn.flash_attn_func(q, k, v, learnable_sink=sinks, **options)
            return list(got) if case.lse else [got]

        primals = [x.q, x.k, x.v] + ([] if x.sinks is None else [x.sinks])
        return mlx_call(case, forward, primals, x.dout)

    def lacks_decode(self, case: DecodeCase) -> str:
        return ""

    def decode(self, case: DecodeCase, pool: CachePool) -> list[Call]:
        attend = _attention_over(case)
        return [attend(_in_our_axes(case, pool.cache(case, index, case.heads_first))) for index in range(pool.caches(case))]


def _in_our_axes(case: DecodeCase, parts: list[mx.array]) -> list[Any]:
    """k and v (batch, length, heads_k, ...), each a tuple of three where they are MLX's codes, then scales if there are."""
    if case.heads_first:
        parts = [x.swapaxes(1, 2) for x in parts]
        mx.eval(parts)
    return [tuple(parts[:3]), tuple(parts[3:])] if case.dtype in MLX_CODES else parts


def paged_decode(case: DecodeCase, pool: CachePool, page_size: int, pages: list[mx.array]) -> list[Call]:
    """Ours on the pool's caches, each through a table of its `pages` in random order."""
    blocks = case.tokens // page_size
    rng = np.random.default_rng(2)
    tables = [
        mx.array((index * blocks + rng.permutation(blocks)).astype(np.int32).reshape(case.batch, -1))
        for index in range(pool.caches(case))
    ]
    mx.eval(tables)
    attend = _attention_over(case)
    return [attend(pages, table) for table in tables]


def _attention_over(case: DecodeCase) -> Callable[..., Call]:
    """The same queries, over whichever cache."""
    q = decode_query(case, case.seqlen_q, case.heads)
    lengths = mx.full((case.batch,), case.length, dtype=mx.int32)
    mx.eval(lengths)

    def attend(cache: list[Any], block_table: mx.array | None = None) -> Call:
        k, v, *scales = cache
        options: dict[str, Any] = dict(zip(("k_scale", "v_scale"), scales, strict=True)) if scales else {}
        options |= {"cache_seqlens": lengths, "block_table": block_table, "causal": True}
        return lambda: mx.eval(flash_attn.flash_attn_with_kvcache(q, k, v, **options))

    return attend


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables that the package reads at every call."""
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def with_environment(call: Call, **values: str) -> Call:
    def changed() -> None:
        with environment(**values):
            call()

    return changed


class Reference(Ours):
    name = "reference"
    title = "composed"
    slow = True

    def prepare(self, case: Case, x: Inputs) -> Call:
        return with_environment(super().prepare(case, x), FLASH_ATTENTION_MLX_REF="1")

    def lacks_decode(self, case: DecodeCase) -> str:
        return "not timed in decode"
