"""What each feature costs a score: the vector instructions that it adds to a lane's work in the main loop, in the code of
generated_code.py. Branches count as taken."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from generated_code import generated_code
from metal_support import metal_graph
from needed import MATRIX_PRODUCTS
from support import attention, normal, packed_qkv, qkv

KERNELS = ("forward", "backward_dq", "backward_dkv")
SEQLEN, HEADS, HEAD_DIM = 64, 4, 64
PLAIN = "plain"


@dataclass(frozen=True)
class FeatureCost:
    feature: str
    instructions_a_score: dict[str, float]  # by kernel; of `plain` all of them, else what is added


def feature_costs() -> list[FeatureCost]:
    random = np.random.default_rng(7)
    plain = qkv(random, 2, SEQLEN, SEQLEN, HEADS, HEADS, HEAD_DIM, HEAD_DIM, mx.float16)
    base = {kernel: instructions(kernel, text) for kernel, text in texts_of(plain).items()}
    costs = [FeatureCost(PLAIN, base)]
    for feature, options in features(random).items():
        # A feature of the numbers alone has no text of its own.
        added = {kernel: instructions(kernel, text) - base[kernel] for kernel, text in texts_of(plain | options).items()}
        costs.append(FeatureCost(feature, {kernel: added.get(kernel, 0.0) for kernel in KERNELS}))
    return costs


def features(random: np.random.Generator) -> dict[str, dict[str, Any]]:
    lengths = [SEQLEN, 40]
    return {
        "causal, window": {"causal": True, "window_size": (32, 0)},
        "softcap": {"softcap": 30.0},
        "ALiBi": {"alibi_slopes": mx.array(random.random(HEADS, np.float32))},
        "sinks": {"learnable_sink": normal(random, HEADS)},
        "attention_chunk": {"attention_chunk": 48},
        "attn_mask, bool": {"attn_mask": mx.array(random.random((2, HEADS, SEQLEN, SEQLEN)) > 0.2)},
        "attn_mask, f32": {"attn_mask": normal(random, 2, HEADS, SEQLEN, SEQLEN)},
        "dropout": {"dropout_p": 0.1, "dropout_key": mx.array([1, 2], mx.uint32)},
        "seqused": {"seqused_k": mx.array(lengths, mx.int32)},
        "GQA 4:1": qkv(random, 2, SEQLEN, SEQLEN, HEADS, 1, HEAD_DIM, HEAD_DIM, mx.float16),
        "varlen": packed_qkv(random, lengths, lengths, HEADS, HEADS, HEAD_DIM, HEAD_DIM, mx.float16),
    }


def texts_of(arguments: dict[str, Any]) -> dict[str, str]:
    """By kernel, those texts of a call and its gradients that no call had before."""
    names = ("q", "k", "v")
    others = {name: value for name, value in arguments.items() if name not in names}

    def out(*arrays: mx.array) -> mx.array:
        return attention(**dict(zip(names, arrays, strict=True)), **others)

    with metal_graph("record", readable=True) as module:
        before = module.recorded_texts()
        mx.eval(mx.vjp(out, [arguments[name] for name in names], [mx.zeros_like(arguments["q"])]))
        new = {name: text for name, text in module.recorded_texts().items() if name not in before}
    return {kernel: text for name, text in new.items() for kernel in KERNELS if name.startswith(f"flash_attn_{kernel}_")}


def instructions(kernel: str, text: str) -> float:
    """Of a lane, for each of its scores."""
    simdgroups = int(re.search(r"#define FA_SIMDGROUPS (\d+)", text)[1])
    lane_products = 8 * 8 * 8 // 32  # multiplications of a lane in one matrix product
    products = MATRIX_PRODUCTS[kernel](HEAD_DIM, HEAD_DIM) / lane_products
    return products * generated_code(text, 32 * simdgroups).instructions_a_product()
