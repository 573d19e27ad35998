"""What every implementation is to the benchmark: calls without arguments that return when the result is computed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from cache_pool import CachePool
from case import INT8, MLX_CODES, Case, DecodeCase
from timing import Call


@dataclass(frozen=True)
class Inputs:
    """In flash-attention's layout: (batch, seqlen, heads, head_dim), varlen (total, heads, head_dim)."""

    q: mx.array
    k: mx.array
    v: mx.array
    dout: mx.array
    attn_mask: mx.array | None
    sinks: mx.array | None
    alibi_slopes: mx.array | None
    cu_seqlens: mx.array | None
    dropout_key: mx.array | None


def make_inputs(case: Case) -> Inputs:
    rng = np.random.default_rng(0)
    dtype = getattr(mx, case.dtype)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)

    tokens = (sum(case.lengths),) if case.lengths else (case.batch, case.seqlen)
    masks = (case.batch, case.heads) if case.attn_mask == "B,H" else (1, 1)
    inputs = Inputs(
        q=normal(*tokens, case.heads, case.head_dim),
        k=normal(*tokens, case.heads_k, case.head_dim),
        v=normal(*tokens, case.heads_k, case.head_dim),
        dout=normal(*tokens, case.heads, case.head_dim),
        attn_mask=normal(*masks, case.seqlen, case.seqlen) if case.attn_mask else None,
        sinks=mx.array(rng.standard_normal(case.heads, dtype=np.float32)) if case.sinks else None,
        alibi_slopes=mx.power(2.0, -8.0 * mx.arange(1, case.heads + 1) / case.heads) if case.alibi else None,
        cu_seqlens=mx.array(np.cumsum((0, *case.lengths)), dtype=mx.int32) if case.lengths else None,
        dropout_key=mx.random.key(0) if case.dropout_p else None,
    )
    mx.eval([x for x in vars(inputs).values() if x is not None])
    return inputs


def decode_query(case: DecodeCase, *axes: int) -> mx.array:
    """(batch, *axes, head_dim)"""
    values = np.random.default_rng(1).standard_normal((case.batch, *axes, case.head_dim), dtype=np.float32)
    q = mx.array(values).astype(getattr(mx, case.query_dtype))
    mx.eval(q)
    return q


class Peer:
    name: str
    title: str
    slow = False  # a call of the usual size takes seconds
    packages: tuple[str, ...] = ()  # that must be installed beside MLX

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def missing(self, case: Case | DecodeCase) -> str:
        """Why it cannot do the case; empty when it can."""
        if any(importlib.util.find_spec(package) is None for package in self.packages):
            return "not installed (make bench-peers)"
        if not isinstance(case, DecodeCase):
            return self.lacks(case)
        return "heads first is how it is timed anyway" if case.heads_first else self.lacks_decode(case)

    def lacks(self, case: Case) -> str:
        return ""

    def prepare(self, case: Case, x: Inputs) -> Call:
        raise NotImplementedError

    def lacks_decode(self, case: DecodeCase) -> str:
        if case.dtype in MLX_CODES:
            return "no cache of MLX's codes"
        return "no int8 cache" if case.dtype == INT8 else ""

    def decode(self, case: DecodeCase, pool: CachePool) -> list[Call]:
        """A call for each cache of the pool."""
        raise NotImplementedError
