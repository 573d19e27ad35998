"""The work that a call needs at least, from which queries see which keys."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cases import Case
from oracle import visible

MATRIX_PRODUCTS = {  # of head dims and value head dims, for every score
    "forward": lambda d, dv: d + dv,  # S, O
    "decode": lambda d, dv: d + dv,
    "backward_dq": lambda d, dv: 2 * d + dv,  # S, dP, dQ
    "backward_dkv": lambda d, dv: 2 * d + 2 * dv,  # S, dP, dV, dK
}
# What a kernel reads again for every block, by the names of its inputs.
STREAMED = {
    "forward": ("k", "v"),
    "decode": ("k", "v"),
    "backward_dq": ("k", "v"),
    "backward_dkv": ("q", "dout"),
}


def seen(case: Case) -> np.ndarray:
    return visible(case.seqlen_q, case.seqlen_k, case.causal, case.window, 0)


def flops(case: Case, kernel: str) -> int:
    return 2 * int(seen(case).sum()) * case.heads * MATRIX_PRODUCTS[kernel](case.head_dim, case.head_dim)


def ranges(case: Case, kernel: str, block: int, group: int) -> Iterator[tuple[int, int]]:
    """Begin and end of what each block of rows needs of the streamed ones: keys, or queries for the blocks of backward_dkv."""
    mask = np.repeat(seen(case), group, axis=0)
    if kernel == "backward_dkv":
        mask = mask.T
    for begin in range(0, mask.shape[0], block):
        needed = np.flatnonzero(mask[begin : begin + block].any(axis=0))
        if needed.size:
            yield int(needed[0]), int(needed[-1]) + 1


def streamed_bytes(case: Case, kernel: str, block: int, group: int) -> int:
    row = 2 * case.head_dim * {"float32": 4}.get(case.dtype, 2)  # K and V, or Q and dO
    if kernel == "decode":
        return case.heads_k * case.seqlen_k * row
    return case.heads // group * row * sum(end - begin for begin, end in ranges(case, kernel, block, group))


def streamed_blocks(case: Case, kernel: str, block: int, step: int, group: int) -> int:
    """Turns of the main loop, all threadgroups together: steps start at multiples of their size."""
    spans = ranges(case, kernel, block, group)
    return case.heads // group * sum(-(-end // step) - begin // step for begin, end in spans)
