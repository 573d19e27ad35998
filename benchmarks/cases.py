"""What is measured: a call's shape and features, and how much work it is."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)

# Lengths of 128 to 1024, 4096 tokens in all.
VARLEN_LENGTHS = (128, 256, 384, 512, 512, 640, 640, 1024)

# One feature each, on top of a plain causal call.
FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "softcap 30": {"softcap": 30.0},
    "ALiBi": {"alibi": True},
    "window (512, 0)": {"window": (512, 0)},
    "dropout 0.1": {"dropout_p": 0.1},
    "sinks": {"sinks": True},
    "LSE out": {"lse": True},
    "GQA 4:1": {"group": 4},
    "attn_mask": {"attn_mask": True},
    "varlen": {"varlen": True},
}

# Which of the fast peers have a feature in their fused kernels.
PEERS_OF_FEATURES: dict[str, tuple[str, ...]] = {
    "softcap 30": ("onnxruntime",),
    "window (512, 0)": ("onnxruntime",),
    "GQA 4:1": ("torch", "onnxruntime"),
    "attn_mask": ("torch",),
}

DTYPE_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Case:
    section: str
    feature: str = "plain"
    batch: int = 1
    heads: int = 8
    heads_k: int = 8
    seqlen: int = 2048
    head_dim: int = 128
    dtype: str = "float32"
    steps: str = FORWARD
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    dropout_p: float = 0.0
    sinks: bool = False
    lse: bool = False
    attn_mask: bool = False
    lengths: tuple[int, ...] = ()  # of the packed sequences; empty: a dense batch
    peers: tuple[str, ...] = ()  # what is timed beside ours
    compare_with_plain: bool = False

    @property
    def backward(self) -> bool:
        return self.steps == FORWARD_BACKWARD

    @property
    def label(self) -> str:
        heads = f"H{self.heads}" if self.heads == self.heads_k else f"H{self.heads}/{self.heads_k}"
        shape = f"B{len(self.lengths)} varlen {sum(self.lengths)}" if self.lengths else f"B{self.batch} S{self.seqlen}"
        mask = "causal" if self.causal else "full"
        feature = "" if self.feature in ("plain", "varlen") else f" {self.feature}"
        return f"{DTYPE_NAMES[self.dtype]} {shape} {heads} D{self.head_dim} {mask}{feature}"

    @property
    def plain(self) -> Case:
        """What `of plain` divides by: the call without its feature; of a plain 16-bit call, the float32 one."""
        return Case(
            section=self.section, batch=self.batch, heads=self.heads, heads_k=self.heads, seqlen=self.seqlen,
            head_dim=self.head_dim, dtype="float32" if self.feature == "plain" else self.dtype, steps=self.steps,
            causal=self.causal,
        )  # fmt: skip

    def restricted_to(self, peers: Collection[str]) -> Case:
        return replace(self, peers=tuple(name for name in self.peers if name in peers))

    def visible_pairs(self) -> int:
        """(query, key) pairs of one head of the whole batch that the mask lets through."""
        lengths = self.lengths or (self.seqlen,) * self.batch
        left, right = self.window
        if self.causal:
            right = 0
        pairs = 0
        for length in lengths:
            row = np.arange(length, dtype=np.int64)
            begin = np.maximum(row - left, 0) if left >= 0 else np.zeros_like(row)
            end = np.minimum(row + right + 1, length) if right >= 0 else np.full_like(row, length)
            pairs += int((end - begin).sum())
        return pairs

    def flops(self) -> float:
        """Forward: two products, 2 flops a multiply-add. Backward: five such products for forward's two."""
        forward = 4.0 * self.heads * self.head_dim * self.visible_pairs()
        return forward * (1.0 + 2.5) if self.backward else forward


def with_feature(case: Case, name: str) -> Case:
    changes = dict(FEATURES[name])
    if group := changes.pop("group", 0):
        changes["heads_k"] = max(1, case.heads // int(str(group)))
    if changes.pop("varlen", False):
        changes["lengths"] = VARLEN_LENGTHS
    return replace(case, feature=name, compare_with_plain=name != "plain", **changes)  # type: ignore[arg-type]


def quick_cases() -> list[Case]:
    """What `make bench` measures, within minutes on two cores. The slow peers come where they say most."""
    fast: tuple[str, ...] = ("torch", "onnxruntime", "openvino")
    everyone = ("sdpa", "reference", *fast)
    cases = [
        Case("shapes", seqlen=512, head_dim=64, steps=steps, peers=everyone) for steps in PASSES
    ]  # fmt: skip
    for steps, head_dim, causal in itertools.product(PASSES, (128, 64), (True, False)):
        headline = steps == FORWARD and head_dim == 128 and causal
        peers = everyone if headline else fast
        cases.append(Case("shapes", head_dim=head_dim, causal=causal, steps=steps, peers=peers))
    for dtype in ("bfloat16", "float16"):
        cases.append(Case("dtypes", dtype=dtype, peers=fast, compare_with_plain=True))
    for steps, head_dim in itertools.product(PASSES, (128, 64)):
        plain = Case("features", head_dim=head_dim, steps=steps)
        for name in FEATURES:
            if name != "plain":
                cases.append(replace(with_feature(plain, name), peers=PEERS_OF_FEATURES.get(name, ())))
    return cases


def grid_cases(
    batch: int, heads: int, heads_k: int, seqlens: list[int], head_dims: list[int], dtypes: list[str], features: list[str],
    passes: list[str], causal: bool, peers: tuple[str, ...],
) -> list[Case]:  # fmt: skip
    cases = []
    for steps, dtype, head_dim, seqlen in itertools.product(passes, dtypes, head_dims, seqlens):
        base = Case(
            "shapes", batch=batch, heads=heads, heads_k=heads_k, seqlen=seqlen, head_dim=head_dim, dtype=dtype, steps=steps,
            causal=causal, peers=peers,
        )  # fmt: skip
        for name in features:
            case = with_feature(base, name)
            cases.append(replace(case, section="shapes" if name == "plain" else "features"))
    return cases


# ---- decode: one query a sequence over a KV cache

INT8 = "int8"  # K and V in int8 with a float32 scale a token and kv head; q in float16
DECODE_DTYPES = ("float32", "bfloat16", "float16", INT8)
DECODE_SHAPES = ((8, 4096), (1, 4096), (1, 16384))  # batch, live tokens


@dataclass(frozen=True)
class DecodeCase:
    batch: int
    length: int
    dtype: str
    heads: int = 32
    heads_k: int = 8
    head_dim: int = 128

    @property
    def query_dtype(self) -> str:
        return "float16" if self.dtype == INT8 else self.dtype

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def label(self) -> str:
        dtype = DTYPE_NAMES.get(self.dtype, self.dtype)
        return f"{dtype} B{self.batch} L{self.length} H{self.heads}/{self.heads_k} D{self.head_dim}"


def decode_cases(dtype: str) -> list[DecodeCase]:
    return [DecodeCase(batch, length, dtype) for batch, length in DECODE_SHAPES]


@dataclass(frozen=True)
class KvConfig:
    """A contiguous cache of `capacity` slots a sequence beside a paged one."""

    batch: int
    live: int  # tokens of each sequence
    capacity: int
    page_size: int
    seqlen_q: int = 1
    heads: int = 8
    heads_k: int = 8
    head_dim: int = 128
    dtype: str = "float16"

    @property
    def blocks(self) -> int:
        """Pages that a sequence needs."""
        return -(-self.live // self.page_size)

    @property
    def label(self) -> str:
        heads = f"H{self.heads}" if self.heads == self.heads_k else f"H{self.heads}/{self.heads_k}"
        return f"B{self.batch} L{self.live} M{self.capacity} P{self.page_size} {heads} D{self.head_dim}"
