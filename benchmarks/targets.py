"""The speeds and the memory that this project promises, beside what a run measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from case import FORWARD, FORWARD_BACKWARD, INT8, MLX_CODES
from peers import TITLES

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    what: str
    against: str  # what `got` is a share or a multiple of, or its unit
    need: float
    got: float | None  # None: this run did not measure it
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.got is None:
            return "not measured"
        met = self.got <= self.need if self.at_most else self.got >= self.need
        return "met" if met else "missed"


# ---- of the ceiling, or of plain: the first line that a row fits says what it needs

Rule = tuple[dict[str, Any], float]

OF_CEILING: Sequence[Rule] = (
    ({"section": "forward", "seqlen": 512}, 0.75),
    ({"section": "forward", "causal": True}, 0.82),
    ({"section": "forward"}, 0.88),
    ({"section": "backward", "seqlen": 512}, 0.72),
    ({"section": "backward", "head_dim": 256}, 0.74),
    ({"section": "backward"}, 0.80),
    ({"section": "half", "ceiling": "f32 FMA", "steps": FORWARD}, 0.82),
    ({"section": "half", "ceiling": "f32 FMA", "steps": FORWARD_BACKWARD}, 0.75),
    ({"section": "half", "steps": FORWARD}, 0.65),
    ({"section": "half", "steps": FORWARD_BACKWARD}, 0.55),
    ({"section": "short", "causal": True}, 0.60),
    ({"section": "short"}, 0.75),
)
OF_PLAIN: Sequence[Rule] = (
    ({"section": "features", "feature": "mask of each head"}, 0.80),
    ({"section": "features"}, 0.92),
    ({"section": "pairs"}, 0.85),
)
OF_READ = {"float32": 0.85, "bfloat16": 0.75, "float16": 0.75}
DECODE_OF_FMA = 0.65  # enough where arithmetic is the limit: 16-bit and int8 caches
INT8_TIMES_FLOAT32 = 2.0

# ---- ahead of the fastest peer: so many times its speed, or what the target above amounts to if that is less, but ahead

AHEAD_CAUSAL_PREFILL = 1.2
AHEAD_BACKWARD = 1.2
AHEAD_HALF_BACKWARD = 5.0  # where the chip has no bf16 dots
AHEAD_DECODE = 2.0
AHEAD = 1.0


def _first_fit(rules: Sequence[Rule], row: Row) -> float | None:
    return next((need for wanted, need in rules if all(row[key] == value for key, value in wanted.items())), None)


def groups(rows: Iterable[Row]) -> list[tuple[Row, list[Row]]]:
    """Ours of each case, and its peers."""
    groups: list[tuple[Row, list[Row]]] = []
    for row in rows:
        if row["implementation"] == "ours":
            groups.append((row, []))
        else:
            groups[-1][1].append(row)
    return groups


def fastest(peers: list[Row]) -> Row | None:
    return min(peers, key=lambda row: row["ms"], default=None)


def _ahead(what: str, ours: Row, peers: list[Row], times: float, bar: Target | None) -> list[Target]:
    """`bar`, in this case's own terms, may ask for less than `times` the fastest peer's speed."""
    peer = fastest(peers)
    if peer is None:
        return []
    got = peer["ms"] / ours["ms"]
    if bar is not None and bar.got:
        times = min(times, got * bar.need / bar.got)
    return [Target(what, f"x {TITLES[peer['implementation']]}", max(AHEAD, times), got)]


def _times_ahead(row: Row, has_bf16: bool) -> float:
    if row["section"] == "half" and row["steps"] == FORWARD_BACKWARD:
        return AHEAD_BACKWARD if has_bf16 else AHEAD_HALF_BACKWARD
    if row["steps"] == FORWARD_BACKWARD:
        return AHEAD_BACKWARD
    return AHEAD_CAUSAL_PREFILL if row["causal"] else AHEAD


def evaluate_cases(rows: list[Row], has_bf16: bool) -> list[Target]:
    """`has_bf16`: the chip multiplies bfloat16, in dot products or matrix tiles."""
    targets = []
    for ours, peers in groups(rows):
        what = f"{ours['label']} {ours['steps']}"
        bar = None
        if need := _first_fit(OF_CEILING, ours):
            bar = Target(what, f"of {ours['ceiling']}", need, ours["of_ceiling"])
        elif need := _first_fit(OF_PLAIN, ours):
            bar = Target(what, "of plain", need, ours["of_plain"])
        if bar:
            targets.append(bar)
            if ours["section"] == "half" and ours["of_plain"]:
                targets.append(Target(what, "of f32's speed", 1.0, ours["of_plain"]))
            # Backward is 1.2 times ahead whatever the bar; the bar may only lower what causal prefill needs.
            lower = bar if ours["steps"] == FORWARD else None
            targets += _ahead(what, ours, peers, _times_ahead(ours, has_bf16), lower)
    return targets


IN_CACHE_TIMES = 1.5


def evaluate_decode(rows: list[Row], fma_gflops: float, cache_gbs: float, empty_op_us: float) -> list[Target]:
    targets = []
    for ours, peers in groups(rows):
        what = f"decode {ours['label']}"
        if ours["in_cache"]:
            least_us = max(ours["flops"] / fma_gflops, ours["bytes"] / cache_gbs) * 1e-3
            need = IN_CACHE_TIMES * least_us + empty_op_us
            targets.append(Target(what, "us", need, ours["ms"] * 1e3, at_most=True))
            targets += _ahead(what, ours, peers, AHEAD, None)
            continue
        if ours["heads_first"] or ours["dtype"] in MLX_CODES:
            continue  # nothing is promised of them
        bars = [Target(what, "of f32 FMA", DECODE_OF_FMA, ours["of_fma"])] if ours["dtype"] != "float32" else []
        if ours["dtype"] == INT8:
            bars.append(Target(what, "of f32's tokens/s", INT8_TIMES_FLOAT32, ours["times_float32"]))
        else:
            bars.append(Target(what, "of read", OF_READ[ours["dtype"]], ours["of_read"]))
        targets.append(max(bars, key=lambda bar: (bar.got or 0.0) / bar.need))
        as_read = Target(what, "of read", OF_READ["float32"], ours["of_read"])
        targets += _ahead(what, ours, peers, AHEAD_DECODE, as_read)
    return targets


PAGED_TIME = 1.04


def evaluate_paged(rows: list[Row]) -> list[Target]:
    return [
        Target(f"{row['label']}, {pages}", "x contiguous time", PAGED_TIME, ratio, at_most=True)
        for row in rows
        for pages, ratio in row["paged_time"].items()
    ]


OF_CEILINGS_GAIN = 0.95
BUSY_GAIN_US = 2.0  # oneTBB: 18 us for 20 us of work


def evaluate_threads(rows: list[Row], busy: Row | None, fma_gain: float | None) -> list[Target]:
    targets = [
        Target(
            f"2 threads over 1, {row['label']} {row['steps']}", "of f32 FMA's gain", OF_CEILINGS_GAIN, row["gain"] / fma_gain
        )
        for row in rows
        if fma_gain
    ]
    if busy:
        what = f"2 threads beside a busy core, {busy['label']}"
        targets.append(Target(what, "us gained by the second", BUSY_GAIN_US, busy["one_us"] - busy["two_us"]))
    return targets


APPEND_ALLOWANCE_US = 20.0


def evaluate_append(append_us: dict[str, float]) -> list[Target]:
    if not append_us:
        return []
    small, large = min(append_us, key=int), max(append_us, key=int)
    ratio = (append_us[large] - APPEND_ALLOWANCE_US) / append_us[small]
    what = f"append at capacity {large}, less {APPEND_ALLOWANCE_US:.0f} us"
    return [Target(what, f"x its time at {small}", 1.2, ratio, at_most=True)]


def evaluate_memory(memory: Row | None) -> list[Target]:
    if memory is None:
        return []
    return [Target(f"peak memory, {memory['label']}", "copies of q", 12.0, memory["process_copies"], at_most=True)]


def evaluate_sdpa(rows: list[Row]) -> list[Target]:
    """The one multiple of MLX's own SDPA that is promised."""
    for ours, peers in groups(rows):
        if ours["section"] == "forward" and (ours["seqlen"], ours["head_dim"], ours["causal"]) == (2048, 128, True):
            sdpa = [peer for peer in peers if peer["implementation"] == "sdpa"]
            if sdpa:
                return [Target(f"{ours['label']} {ours['steps']}, MLX", "x MLX SDPA", 20.0, sdpa[0]["ms"] / ours["ms"])]
    return []
