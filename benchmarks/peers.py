"""One call of a case by each implementation, as a function without arguments that returns when the result is computed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from cases import Case
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
    inputs = Inputs(
        q=normal(*tokens, case.heads, case.head_dim),
        k=normal(*tokens, case.heads_k, case.head_dim),
        v=normal(*tokens, case.heads_k, case.head_dim),
        dout=normal(*tokens, case.heads, case.head_dim),
        attn_mask=normal(1, 1, case.seqlen, case.seqlen) if case.attn_mask else None,
        sinks=mx.array(rng.standard_normal(case.heads, dtype=np.float32)) if case.sinks else None,
        alibi_slopes=mx.power(2.0, -8.0 * mx.arange(1, case.heads + 1) / case.heads) if case.alibi else None,
        cu_seqlens=mx.array(np.cumsum((0, *case.lengths)), dtype=mx.int32) if case.lengths else None,
        dropout_key=mx.random.key(0) if case.dropout_p else None,
    )
    mx.eval([x for x in vars(inputs).values() if x is not None])
    return inputs


def _mlx_call(case: Case, forward: Callable[..., list[mx.array]], primals: list[mx.array], dout: mx.array) -> Call:
    """Forward, or forward and backward with cotangent 1 for a returned LSE."""
    if not case.backward:
        return lambda: mx.eval(forward(*primals))

    def forward_backward() -> None:
        cotangents = [dout]
        if case.lse:
            shape = (case.heads, dout.shape[0]) if case.lengths else (case.batch, case.heads, case.seqlen)
            cotangents.append(mx.ones(shape))
        mx.eval(mx.vjp(forward, primals, cotangents))

    return forward_backward


class Implementation(Protocol):
    name: str

    def missing(self, case: Case) -> str:
        """Why it cannot do the case; empty when it can."""
        ...

    def prepare(self, case: Case, x: Inputs) -> Call: ...


class Ours:
    name = "ours"

    def missing(self, case: Case) -> str:
        return ""

    def prepare(self, case: Case, x: Inputs) -> Call:
        import flash_attn

        options = {
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
        return _mlx_call(case, forward, primals, x.dout)


@contextmanager
def _reference_forced() -> Iterator[None]:
    os.environ["FLASH_ATTENTION_MLX_REF"] = "1"
    try:
        yield
    finally:
        del os.environ["FLASH_ATTENTION_MLX_REF"]


class Reference(Ours):
    """The same functions as compositions of MLX ops: what a user would write without a fused kernel."""

    name = "reference"

    def prepare(self, case: Case, x: Inputs) -> Call:
        call = super().prepare(case, x)

        def forced() -> None:
            with _reference_forced():
                call()

        return forced


class Sdpa:
    """mx.fast.scaled_dot_product_attention, on tensors already in the layout that it likes."""

    name = "sdpa"

    def missing(self, case: Case) -> str:
        if case.lengths or case.window != (-1, -1) or case.softcap or case.alibi or case.dropout_p or case.lse:
            return f"no {case.feature}"
        return "either causal or attn_mask" if case.attn_mask and case.causal else ""

    def prepare(self, case: Case, x: Inputs) -> Call:
        def heads_first(t: mx.array) -> mx.array:
            return mx.contiguous(t.swapaxes(1, 2))

        primals = [heads_first(t) for t in (x.q, x.k, x.v)]
        dout = heads_first(x.dout)
        mx.eval(primals, dout)
        mask = "causal" if case.causal else x.attn_mask
        scale = case.head_dim**-0.5
        sinks = None if x.sinks is None else x.sinks.astype(x.q.dtype)

        def forward(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
            return [mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)]

        return _mlx_call(case, forward, primals, dout)


class Torch:
    """PyTorch's scaled_dot_product_attention, which on CPU is its own flash kernel."""

    name = "torch"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def missing(self, case: Case) -> str:
        if importlib.util.find_spec("torch") is None:
            return "not installed (make bench-peers)"
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
                mask = mask.masked_fill(torch.ones(mask.shape, dtype=torch.bool).triu(1), float("-inf"))

        def call() -> None:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=case.causal and mask is None, enable_gqa=case.heads != case.heads_k
                )
            if case.backward:
                torch.autograd.grad(out, (q, k, v), dout)

        return call
