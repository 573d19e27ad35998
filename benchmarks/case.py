"""What a case is: a call's shape and features, and how much work it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)

DTYPE_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
INT8 = "int8"  # K and V in int8 with a float32 scale a token and kv head; q in float16
MLX_CODES = {"mlx8": 8, "mlx4": 4}  # K and V as mx.quantize gives them, in so many bits, groups of 64; q in float16

# Lengths of 128 to 1024, 4096 tokens in all.
VARLEN_LENGTHS = (128, 256, 384, 512, 512, 640, 640, 1024)

# What each adds to a plain causal call.
FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "softcap": {"softcap": 30.0},
    "ALiBi": {"alibi": True},
    "window": {"window": (512, 0)},
    "dropout": {"dropout_p": 0.1},
    "sinks": {"sinks": True},
    "LSE": {"lse": True},
    "GQA": {"group": 4},
    "varlen": {"lengths": VARLEN_LENGTHS},
    "mask": {"attn_mask": "1,1"},
    "mask of each head": {"attn_mask": "B,H"},
}


def _heads(heads: int, heads_k: int) -> str:
    return f"H{heads}" if heads == heads_k else f"H{heads}/{heads_k}"


@dataclass(frozen=True)
class Case:
    section: str
    feature: str = "plain"  # names of FEATURES, joined by " + "
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
    attn_mask: str = ""  # "1,1": one (S, S) for all heads, "B,H": one for each
    lengths: tuple[int, ...] = ()  # of the packed sequences; empty: a dense batch
    quick: bool = True  # a part of `make bench`
    slow_peers: bool = False  # the peers that take seconds are timed here in `make bench` too

    @property
    def backward(self) -> bool:
        return self.steps == FORWARD_BACKWARD

    @property
    def label(self) -> str:
        shape = f"B{len(self.lengths)} varlen {sum(self.lengths)}" if self.lengths else f"B{self.batch} S{self.seqlen}"
        mask = "causal" if self.causal else "full"
        feature = "" if self.feature in ("plain", "varlen") else f" {self.feature}"
        return f"{DTYPE_NAMES[self.dtype]} {shape} {_heads(self.heads, self.heads_k)} D{self.head_dim} {mask}{feature}"

    @property
    def plain(self) -> Case | None:
        """What `of plain` divides by: the call without its features; of a plain 16-bit call, the float32 one."""
        if self.feature == "plain" and self.dtype == "float32":
            return None
        return Case(
            section=self.section, batch=self.batch, heads=self.heads, heads_k=self.heads, seqlen=self.seqlen,
            head_dim=self.head_dim, dtype="float32" if self.feature == "plain" else self.dtype, steps=self.steps,
            causal=self.causal,
        )  # fmt: skip

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


def with_features(case: Case, *names: str) -> Case:
    changes: dict[str, object] = {}
    for name in names:
        changes |= FEATURES[name]
    if group := changes.pop("group", 0):
        changes["heads_k"] = max(1, case.heads // int(str(group)))
    return replace(case, feature=" + ".join(names), **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DecodeCase:
    """A few queries a sequence, its last tokens, over its keys in a KV cache."""

    batch: int
    length: int  # live tokens of each sequence
    dtype: str
    heads: int = 32
    heads_k: int = 8
    head_dim: int = 128
    seqlen_q: int = 1
    heads_first: bool = False  # a head's tokens lie side by side, as in mlx-lm; else a token's heads
    in_cache: bool = False  # every call reads the same keys: the processor's caches hold them

    @property
    def query_dtype(self) -> str:
        return "float16" if self.dtype == INT8 or self.dtype in MLX_CODES else self.dtype

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def label(self) -> str:
        queries = f" Q{self.seqlen_q}" if self.seqlen_q > 1 else ""
        dtype = DTYPE_NAMES.get(self.dtype, self.dtype)
        heads = _heads(self.heads, self.heads_k)
        where = " heads first" * self.heads_first + " in cache" * self.in_cache
        return f"{dtype} B{self.batch} L{self.length}{queries} {heads} D{self.head_dim}{where}"

    def flops(self) -> float:
        """Every query counts every key: exact for one query."""
        return 4.0 * self.heads * self.head_dim * self.tokens * self.seqlen_q


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
        heads = _heads(self.heads, self.heads_k)
        return f"B{self.batch} L{self.live} M{self.capacity} P{self.page_size} {heads} D{self.head_dim}"
