"""A call of MLX functions: forward, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from case import Case
from timing import Call


def mlx_call(case: Case, forward: Callable[..., list[mx.array]], primals: list[mx.array], dout: mx.array) -> Call:
    """Backward has cotangent 1 for a returned LSE."""
    if not case.backward:
        return lambda: mx.eval(forward(*primals))

    def forward_backward() -> None:
        cotangents = [dout]
        if case.lse:
            shape = (case.heads, dout.shape[0]) if case.lengths else (case.batch, case.heads, case.seqlen)
            cotangents.append(mx.ones(shape))
        mx.eval(mx.vjp(forward, primals, cotangents))

    return forward_backward
