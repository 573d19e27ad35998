"""The calls whose work is counted, and the most work that each may take."""

from __future__ import annotations

from dataclasses import dataclass

# Ratios to the work that the call needs.
PREFILL_BYTES = 1.02  # of the rows of K and V that each block of queries needs
DECODE_BYTES = 1.02  # of K and V once a kv head


@dataclass(frozen=True)
class Case:
    name: str
    seqlen_q: int
    seqlen_k: int
    flops: float | None = None  # bound of matrix flops / needed
    bytes: float | None = None  # bound of bytes of K and V / needed
    dtype: str = "float16"
    head_dim: int = 64
    heads: int = 1
    heads_k: int = 1
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    backward: bool = False
    page_size: int | None = None  # 0: a contiguous cache
    steel: bool = False  # MLX's kernel can compute it


def _forward(name: str, length: int, flops: float, **options: object) -> Case:
    return Case(name, length, length, flops, PREFILL_BYTES, **options)


CASES = (
    _forward("full, 2048", 2048, 1.05, steel=True),
    _forward("causal, 2048", 2048, 1.05, causal=True, steel=True),
    _forward("window (512, 0), 2048", 2048, 1.08, window=(512, 0)),
    _forward("causal, 2048, D 128", 2048, 1.05, causal=True, head_dim=128, steel=True),
    _forward("causal, 512, D 256", 512, 1.05, causal=True, head_dim=256),
    _forward("causal, 512, bf16 D 128, 4 heads to 1", 512, 1.05, causal=True, head_dim=128, heads=4, dtype="bfloat16"),
    _forward("causal, 512, f32", 512, 1.05, causal=True, dtype="float32", steel=True),
    Case("ragged 200 x 333", 200, 333, 1.15, PREFILL_BYTES, steel=True),
    Case("ragged 200 x 333, causal", 200, 333, 1.15, PREFILL_BYTES, causal=True, steel=True),
    Case("backward, full, 512", 512, 512, 1.05, backward=True),
    Case("backward, causal, 1024", 1024, 1024, 1.05, causal=True, backward=True),
    Case("backward, causal, 512, D 128", 512, 512, 1.05, causal=True, head_dim=128, backward=True),
    Case("backward, ragged 200 x 333, causal", 200, 333, 1.15, causal=True, backward=True),
    Case("decode, 4096 keys, 8 heads to 1, D 128", 1, 4096, None, DECODE_BYTES, head_dim=128, heads=8, page_size=0),
    Case("decode, 4096 keys, pages of 16", 1, 4096, None, DECODE_BYTES, head_dim=128, heads=8, page_size=16),
    Case("decode, 1000 keys, 4 heads", 1, 1000, None, DECODE_BYTES, heads=4, heads_k=4, page_size=0),
)
