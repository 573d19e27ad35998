"""mx.fast.scaled_dot_product_attention, on tensors already in the layout that it likes."""

from __future__ import annotations

import mlx.core as mx

from cache_pool import CachePool
from case import Case, DecodeCase
from peers.base import Inputs, Peer, decode_query
from peers.mlx_calls import mlx_call
from timing import Call


class MlxSdpa(Peer):
    name = "sdpa"
    title = "MLX SDPA"
    slow = True

    def lacks(self, case: Case) -> str:
        if case.lengths or case.window != (-1, -1) or case.softcap or case.alibi or case.dropout_p or case.lse:
            return f"no {case.feature}"
        return "either causal or attn_mask" if case.attn_mask and case.causal else ""

    def prepare(self, case: Case, x: Inputs) -> Call:
        primals = [mx.contiguous(t.swapaxes(1, 2)) for t in (x.q, x.k, x.v)]
        dout = mx.contiguous(x.dout.swapaxes(1, 2))
        mx.eval(primals, dout)
        mask = "causal" if case.causal else x.attn_mask
        scale = case.head_dim**-0.5
        sinks = None if x.sinks is None else x.sinks.astype(x.q.dtype)

        def forward(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
            return [mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)]

        return mlx_call(case, forward, primals, dout)

    def decode(self, case: DecodeCase, pool: CachePool) -> list[Call]:
        q = decode_query(case, case.heads, 1)
        scale = case.head_dim**-0.5

        def call(k: mx.array, v: mx.array) -> Call:
            return lambda: mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale))

        return [call(*pool.cache(case, index, heads_first=True)) for index in range(pool.caches(case))]
