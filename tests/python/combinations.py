"""Calls that use several features at once, drawn at random."""

from __future__ import annotations

import itertools
import random
from typing import Any

import mlx.core as mx
import numpy as np
from support import DTYPES, normal, packed_qkv, qkv

FEATURES = (
    "causal",
    "window",
    "softcap",
    "alibi",
    "sink",
    "chunk",
    "additive_mask",
    "boolean_mask",
    "qv",
    "dropout",
    "seqused",
    "varlen",
)


def sample(count: int, seed: int) -> list[frozenset[str]]:
    """Some of the 3072 sets of features that go together (a call has one mask)."""
    every = [
        frozenset(chosen)
        for size in range(len(FEATURES) + 1)
        for chosen in itertools.combinations(FEATURES, size)
        if not {"additive_mask", "boolean_mask"} <= set(chosen)
    ]
    return random.Random(seed).sample(every, count)


def name_of(features: frozenset[str]) -> str:
    return "+".join(name for name in FEATURES if name in features) or "plain"


def build(rng: np.random.Generator, features: frozenset[str], dtype: mx.Dtype | None = None) -> dict[str, Any]:
    """Arguments of a small call with these features: three sequences, random lengths, heads and head dims."""
    batch = 3
    dtype = dtype or DTYPES[int(rng.integers(3))]
    heads, heads_k = [(4, 4), (4, 2), (6, 1)][int(rng.integers(3))]
    dim, dim_v = [(32, 32), (40, 24), (16, 64)][int(rng.integers(3))]
    if "varlen" in features:
        lengths_q, lengths_k = ([int(n) for n in rng.integers(0, 45, batch)] for _ in range(2))
        lengths_q[0], lengths_k[0] = 21, 33
        seqlen_q, seqlen_k = max(lengths_q), max(lengths_k)
        arguments = packed_qkv(rng, lengths_q, lengths_k, heads, heads_k, dim, dim_v, dtype)
    else:
        seqlen_q, seqlen_k = int(rng.integers(1, 60)), int(rng.integers(1, 60))
        lengths_k = [seqlen_k] * batch
        arguments = qkv(rng, batch, seqlen_q, seqlen_k, heads, heads_k, dim, dim_v, dtype)

    if "causal" in features:
        arguments["causal"] = True
    if "window" in features:
        arguments["window_size"] = tuple(int(side) for side in rng.integers(-1, 30, 2))
    if "softcap" in features:
        arguments["softcap"] = 3.0
    if "alibi" in features:
        arguments["alibi_slopes"] = mx.array(rng.random((batch, heads)).astype(np.float32) * 0.3)
    if "sink" in features:
        arguments["learnable_sink"] = normal(rng, heads)
    if "chunk" in features:
        arguments["attention_chunk"] = int(rng.integers(1, 40))
    if "additive_mask" in features:
        arguments["attn_mask"] = normal(rng, batch, 1, seqlen_q, seqlen_k)
    if "boolean_mask" in features:
        arguments["attn_mask"] = mx.array(rng.random((1, heads, seqlen_q, seqlen_k)) > 0.2)
    if "qv" in features:
        arguments["qv"] = normal(rng, *arguments["q"].shape[:-1], dim_v, dtype=dtype)
    if "dropout" in features:
        arguments |= {"dropout_p": 0.17, "dropout_key": mx.array(rng.integers(0, 2**32, 2, np.uint32))}
    if "seqused" in features:
        arguments["seqused_k"] = mx.array(np.array([rng.integers(0, n + 1) for n in lengths_k], np.int32))
    return arguments
