"""PyTorch's scaled_dot_product_attention, which on CPU is its own flash kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from cache_pool import CachePool
from case import Case, DecodeCase
from peers.base import Inputs, Peer, decode_query
from timing import Call

if TYPE_CHECKING:
    import torch


class PyTorch(Peer):
    name = "torch"
    title = "PyTorch"
    packages = ("torch",)

    def lacks(self, case: Case) -> str:
        if case.lengths or case.window != (-1, -1) or case.softcap or case.alibi or case.dropout_p or case.lse or case.sinks:
            return f"no fused {case.feature} on CPU"
        return ""

    def prepare(self, case: Case, x: Inputs) -> Call:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        torch.set_num_threads(self.threads)
        dtype = getattr(torch, case.dtype)

        def heads_first(t: mx.array) -> torch.Tensor:
            return torch.from_numpy(np.array(t.swapaxes(1, 2).astype(mx.float32))).to(dtype).contiguous()

        q, k, v = (heads_first(t).requires_grad_(case.backward) for t in (x.q, x.k, x.v))
        dout = heads_first(x.dout)
        mask = None
        if x.attn_mask is not None:
            mask = torch.from_numpy(np.array(x.attn_mask.astype(mx.float32))).to(dtype)
            if case.causal:
                mask = mask.masked_fill(torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))

        def call() -> None:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=case.causal and mask is None, enable_gqa=case.heads != case.heads_k
                )
            if case.backward:
                torch.autograd.grad(out, (q, k, v), dout)

        return call

    def decode(self, case: DecodeCase, pool: CachePool) -> list[Call]:
        """On the pool's own memory, heads first."""
        import torch

        torch.set_num_threads(self.threads)
        q = torch.from_dlpack(decode_query(case, case.heads, 1))

        @torch.inference_mode()
        def attend(k: torch.Tensor, v: torch.Tensor) -> None:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=case.heads != case.heads_k)

        def call(k: mx.array, v: mx.array) -> Call:
            keys, values = torch.from_dlpack(k), torch.from_dlpack(v)
            return lambda: attend(keys, values)

        return [call(*pool.cache(case, index, heads_first=True)) for index in range(pool.caches(case))]
