"""The speeds and the memory that this project promises, beside what a run measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cases import DTYPE_NAMES, FEATURES, FORWARD, FORWARD_BACKWARD, INT8

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    what: str
    need: float
    measured: float | None  # None: this run did not measure it
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured <= self.need if self.at_most else self.measured >= self.need
        return "met" if met else "missed"


def _find(rows: list[Row], implementation: str = "ours", **wanted: Any) -> Row | None:
    for row in rows:
        if row["implementation"] == implementation and all(row[key] == value for key, value in wanted.items()):
            return row
    return None


def _value(row: Row | None, key: str) -> float | None:
    return row[key] if row else None


def _ratio(numerator: Row | None, denominator: Row | None, key: str) -> float | None:
    return numerator[key] / denominator[key] if numerator and denominator else None


def evaluate(rows: list[Row], memory: Row | None) -> list[Target]:
    headline: Row = {"section": "shapes", "seqlen": 2048, "head_dim": 128, "causal": True}
    forward = _find(rows, dtype="float32", steps=FORWARD, **headline)
    both = _find(rows, dtype="float32", steps=FORWARD_BACKWARD, **headline)
    targets = [
        Target("f32 S2048 D128 causal forward, of the FMA ceiling", 0.72, _value(forward, "of_ceiling")),
        Target("the same forward + backward, of the FMA ceiling", 0.65, _value(both, "of_ceiling")),
        Target(
            "the same forward, times faster than MLX SDPA", 20.0,
            _ratio(_find(rows, "sdpa", dtype="float32", steps=FORWARD, **headline), forward, "ms"),
        ),
        Target("f32 forward, times faster than PyTorch", 1.0,
               _ratio(_find(rows, "torch", dtype="float32", steps=FORWARD, **headline), forward, "ms")),
        Target("f32 forward + backward, times faster than PyTorch", 1.0,
               _ratio(_find(rows, "torch", dtype="float32", steps=FORWARD_BACKWARD, **headline), both, "ms")),
    ]  # fmt: skip
    for dtype in ("bfloat16", "float16"):
        ours = _find(rows, section="dtypes", dtype=dtype)
        torch = _find(rows, "torch", section="dtypes", dtype=dtype)
        targets.append(Target(f"{dtype} forward, of float32's speed", 1.0, _value(ours, "of_plain")))
        targets.append(Target(f"{dtype} forward, times faster than PyTorch", 1.0, _ratio(torch, ours, "ms")))
    for feature in FEATURES:
        found = [
            row["of_plain"] for row in rows if row["feature"] == feature and row["of_plain"] and row["section"] == "features"
        ]
        if feature != "plain":
            targets.append(Target(f"{feature}, of plain per visible pair, worst of its cases", 0.80, min(found, default=None)))
    copies = memory["process_copies"] if memory else None
    targets.append(Target("S32768 D64 H2 forward + backward, peak in copies of q", 12.0, copies, at_most=True))
    return targets


READ_SHARES = {"float32": 0.75, "bfloat16": 0.50, "float16": 0.50}
APPEND_ALLOWANCE_US = 20.0


def evaluate_decode(rows: list[Row], append_us: dict[str, float]) -> list[Target]:
    """Worst of the shapes of a dtype, page sizes worst of all cases."""
    ours = [row for row in rows if row["implementation"] == "ours"]
    torch_ms = {row["label"]: row["ms"] for row in rows if row["implementation"] == "torch"}
    targets = []
    for dtype, need in READ_SHARES.items():
        of_dtype = [row for row in ours if row["dtype"] == dtype]
        share = min((row["of_read"] for row in of_dtype), default=None)
        faster = min((torch_ms[row["label"]] / row["ms"] for row in of_dtype if row["label"] in torch_ms), default=None)
        targets.append(Target(f"decode {DTYPE_NAMES[dtype]}, of the memory read ceiling", need, share))
        targets.append(Target(f"decode {DTYPE_NAMES[dtype]}, times faster than PyTorch", 1.0, faster))
    int8 = min((row["times_float16"] for row in ours if row["dtype"] == INT8), default=None)
    targets.append(Target("decode int8, times faster than f16", 1.0, int8))
    for page_size in ours[0]["paged_time"] if ours else ():
        slowest = max(row["paged_time"][page_size] for row in ours)
        targets.append(Target(f"decode, page size {page_size}, time over contiguous", 1.05, slowest, at_most=True))
    if append_us:
        small, large = append_us.values()
        ratio = (large - APPEND_ALLOWANCE_US) / small
        what = (
            f"append at capacity {max(append_us, key=int)}, less {APPEND_ALLOWANCE_US:.0f} us, over {min(append_us, key=int)}"
        )
        targets.append(Target(what, 1.2, ratio, at_most=True))
    return targets
