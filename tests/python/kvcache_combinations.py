"""Calls of flash_attn_with_kvcache that use several features at once, drawn at random."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
from kvcache_support import cache_call, pack_new_keys, pack_queries, page, rotary
from support import DTYPES, integers, normal

FEATURES = (
    "append",
    "rotary",
    "rotary_seqlens",
    "leftpad",
    "batch_idx",
    "paged",
    "holes",
    "packed_q",
    "packed_new",
    "causal",
    "window",
    "softcap",
    "alibi",
    "sink",
    "qv",
    "chunk",
    "splits",
)
NEEDS = {"rotary": "append", "rotary_seqlens": "rotary", "holes": "paged", "packed_new": "append"}
PAGE_SIZES = (1, 3, 16, 40)


def goes_together(features: frozenset[str]) -> bool:
    # Where a query stands without a causal mask or window, but with chunks, differs between upstream's versions.
    if {"rotary", "chunk"} <= features and not features & {"causal", "window"}:
        return False
    return all(NEEDS[feature] in features for feature in features if feature in NEEDS)


def sample(count: int, seed: int) -> list[frozenset[str]]:
    draw = random.Random(seed)
    chosen: list[frozenset[str]] = []
    while len(chosen) < count:
        features = frozenset(feature for feature in FEATURES if draw.random() < 0.45)
        if goes_together(features) and features not in chosen:
            chosen.append(features)
    return chosen


def name_of(features: frozenset[str]) -> str:
    return "+".join(name for name in FEATURES if name in features) or "plain"


def punch_holes(rng: np.random.Generator, arguments: dict[str, Any]) -> dict[str, Any]:
    """-1 in place of every fourth page that takes no new token."""
    table = np.array(arguments["block_table"])
    page_size = arguments["k_cache"].shape[1]
    rows = np.array(arguments.get("cache_batch_idx", np.arange(len(table))))
    for row, length in zip(rows, np.array(arguments["cache_seqlens"]), strict=False):
        full = int(length) // page_size
        table[row, :full][rng.random(full) < 0.25] = -1
    return arguments | {"block_table": mx.array(table)}


def build(rng: np.random.Generator, features: frozenset[str], dtype: mx.Dtype | None = None) -> dict[str, Any]:
    """Arguments of a small call with these features: three sequences, random lengths, heads and head dims."""
    batch = 3
    dtype = dtype or DTYPES[int(rng.integers(3))]
    heads, heads_k = [(4, 4), (4, 2), (6, 1)][int(rng.integers(3))]
    dim, dim_v = [(32, 32), (40, 24), (16, 64)][int(rng.integers(3))]
    seqlen_q = int(rng.choice([1, 1, 2, 5, 17, 33]))
    seqlen_new = int(rng.choice([1, seqlen_q, 7])) if "append" in features else None
    rows = 5 if "batch_idx" in features else batch
    arguments = cache_call(rng, batch, seqlen_q, 75, heads, heads_k, dim, dim_v, seqlen_new, dtype, rows)

    if "rotary" in features:
        rotary_dim = int(rng.choice([16, dim // 16 * 16]))
        arguments = rotary(rng, arguments, rotary_dim, bool(rng.integers(2)))
    if "rotary_seqlens" in features:
        arguments["rotary_seqlens"] = integers(*rng.integers(0, 100, batch))
    if "leftpad" in features:
        arguments["cache_leftpad"] = integers(*(rng.integers(0, int(n) + 1) for n in arguments["cache_seqlens"].tolist()))
    if "batch_idx" in features:
        arguments["cache_batch_idx"] = integers(*rng.permutation(rows)[:batch])
    if "paged" in features:
        arguments = page(rng, arguments, int(rng.choice(PAGE_SIZES)))
    if "holes" in features:
        arguments = punch_holes(rng, arguments)
    if "causal" in features:
        arguments["causal"] = True
    if "window" in features:
        arguments["window_size"] = tuple(int(side) for side in rng.integers([0, -1], 30, 2))
    if "softcap" in features:
        arguments["softcap"] = 3.0
    if "alibi" in features:
        shape = (heads,) if rng.integers(2) else (batch, heads)
        arguments["alibi_slopes"] = mx.array(rng.random(shape).astype(np.float32) * 0.3)
    if "sink" in features:
        arguments["learnable_sink"] = normal(rng, heads)
    if "qv" in features:
        arguments["qv"] = normal(rng, batch, seqlen_q, heads, dim_v, dtype=dtype)
    if "chunk" in features:
        arguments["attention_chunk"] = int(rng.integers(1, 60))
    if "splits" in features:
        arguments["num_splits"] = int(rng.choice([1, 3, 200]))
    if "packed_q" in features:
        arguments = pack_queries(arguments, [seqlen_q, *(int(n) for n in rng.integers(0, seqlen_q + 1, batch - 1))])
    if "packed_new" in features:
        assert seqlen_new is not None
        arguments = pack_new_keys(arguments, [seqlen_new, *(int(n) for n in rng.integers(0, seqlen_new + 1, batch - 1))])
    return arguments
