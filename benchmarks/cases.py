"""What is measured, section by section: tables of cases. `make bench` takes those with `quick`, --sections all of a section."""

from __future__ import annotations

import itertools

from case import DTYPE_NAMES, FEATURES, FORWARD, FORWARD_BACKWARD, INT8, MLX_CODES, PASSES, Case, DecodeCase, with_features


def _forward() -> list[Case]:
    """Every head dim at S2048, causal and full, and at S512 causal."""
    return [
        Case(
            "forward", seqlen=seqlen, head_dim=dim, causal=causal,
            slow_peers=seqlen == 512 or (dim == 128 and causal),
        )
        for seqlen, causal in ((2048, True), (2048, False), (512, True))
        for dim in (64, 96, 128, 256)
    ]  # fmt: skip


def _backward() -> list[Case]:
    shapes = [(2048, dim, True) for dim in (64, 96, 128, 256)] + [(512, 128, True), (2048, 64, False), (2048, 128, False)]
    return [
        Case(
            "backward", seqlen=seqlen, head_dim=dim, causal=causal, steps=FORWARD_BACKWARD, quick=causal,
            slow_peers=seqlen == 512,
        )
        for seqlen, dim, causal in shapes
    ]  # fmt: skip


def _half() -> list[Case]:
    return [
        Case("half", dtype=dtype, head_dim=dim, steps=steps, causal=causal, quick=causal)
        for steps, dtype, dim, causal in itertools.product(PASSES, ("bfloat16", "float16"), (128, 64), (True, False))
    ]


def _short() -> list[Case]:
    return [
        Case("short", batch=8, heads=16, heads_k=16, seqlen=seqlen, head_dim=64, causal=causal, slow_peers=True)
        for seqlen, causal in itertools.product((128, 256), (False, True))
    ]


FORWARD_ONLY = ("mask of each head",)
PAIRS_OF_FEATURES = (
    ("ALiBi", "dropout"),
    ("softcap", "window"),
    ("ALiBi", "window"),
    ("sinks", "window"),
    ("softcap", "ALiBi"),
)


def _with_all(section: str, chosen: list[tuple[str, ...]]) -> list[Case]:
    return [
        with_features(Case(section, head_dim=dim, steps=steps, quick=dim == 128), *names)
        for steps, dim, names in itertools.product(PASSES, (128, 64), chosen)
        if steps == FORWARD or names[0] not in FORWARD_ONLY
    ]


ATTENTION_SECTIONS = {
    "forward": _forward(),
    "backward": _backward(),
    "half": _half(),
    "short": _short(),
    "features": _with_all("features", [(name,) for name in FEATURES if name != "plain"]),
    "pairs": _with_all("pairs", list(PAIRS_OF_FEATURES)),
}

# What has no table of attention cases, and how its part of the summary is called.
OTHER_SECTIONS = ("decode", "pages", "threads", "kv", "memory")
SECTIONS = (*ATTENTION_SECTIONS, *OTHER_SECTIONS)


def section_cases(sections: list[str], quick: bool) -> tuple[list[Case], list[Case]]:
    """Those to measure, and those of the same sections that `quick` leaves out."""
    cases = [case for name in sections for case in ATTENTION_SECTIONS.get(name, ())]
    return [case for case in cases if case.quick or not quick], [case for case in cases if quick and not case.quick]


def grid_cases(
    batch: int, heads: int, heads_k: int, seqlens: list[int], head_dims: list[int], dtypes: list[str], features: list[str],
    passes: list[str], causal: bool,
) -> list[Case]:  # fmt: skip
    """Every combination of the options of a command line."""
    return [
        with_features(
            Case(
                "shapes" if name == "plain" else "features", batch=batch, heads=heads, heads_k=heads_k, seqlen=seqlen,
                head_dim=dim, dtype=dtype, steps=steps, causal=causal,
            ),
            name,
        )
        for steps, dtype, dim, seqlen, name in itertools.product(passes, dtypes, head_dims, seqlens, features)
    ]  # fmt: skip


# ---- caches

DECODE_DTYPES = (*DTYPE_NAMES, INT8, *MLX_CODES)
DECODE_SHAPES = ((8, 4096), (1, 4096), (1, 16384))  # batch, live tokens
PREFILL_SHAPES = ((2048, 2048), (4096, 512))  # live tokens, queries: a whole prompt, and a part of a longer one
PAGE_SIZES = (16, 128)


def decode_cases(dtype: str) -> list[DecodeCase]:
    if dtype in MLX_CODES:
        return [DecodeCase(1, 4096, dtype, heads_first=heads_first) for heads_first in (False, True)]
    beyond_caches = [DecodeCase(batch, length, dtype) for batch, length in DECODE_SHAPES]
    heads_first = [DecodeCase(1, 4096, dtype, heads_first=True)] if dtype == "float16" else []
    return [*beyond_caches, *heads_first, DecodeCase(1, 512, dtype, in_cache=True)]


def paged_cases(dtype: str) -> list[DecodeCase]:
    """Timed in pages of PAGE_SIZES against a contiguous cache."""
    if dtype in MLX_CODES:
        return []
    prefill = [DecodeCase(1, length, dtype, heads=8, seqlen_q=queries) for length, queries in PREFILL_SHAPES]
    return [DecodeCase(batch, length, dtype) for batch, length in DECODE_SHAPES] + (prefill if dtype == "float32" else [])


# ---- threads

THREAD_CASES = (
    Case("threads"),
    Case("threads", steps=FORWARD_BACKWARD),
    Case("threads", batch=8, heads=16, heads_k=16, seqlen=256, head_dim=64, causal=False),
)
# 20 us of work, as in the measurement of oneTBB that it is judged by.
BUSY_CASE = Case("threads", heads=4, heads_k=4, seqlen=64, head_dim=64, causal=False)
