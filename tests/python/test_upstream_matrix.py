"""Upstream's own test matrix (tests/test_flash_attn.py and hopper/test_flash_attn.py): its shapes, features and tolerances.

The whole matrix has over 80,000 cases. By default a fixed, seeded sample of cheap ones from every table runs; with FRACTION
set, `pytest -m full` runs that share of each table, whatever its cost. The function is always called on the whole tensor; the
float64 truth is computed for one (batch item, kv head) of it, since no other element can depend on another's inputs.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from support import (
    ROUNDING,
    assert_as_precise,
    assert_close,
    cotangents_of,
    expected,
    integers,
    name_of,
    normal,
    representation_slack,
    run,
    to_numpy,
)
from support import Cotangents as CallCotangents

Case = dict[str, Any]

DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
HALF = (mx.float16, mx.bfloat16)
FLAG = (False, True)
DROPOUT = (0.0, 0.17)
SEQLENS = (97, 128, 200, 384, 768, 1024, 1025, 2048)
VARLEN_SEQLENS = (97, 128, 200, 257, 384, 512, 768, 1025, 2048)
CAUSAL_PAIRS = (
    (1, 239),
    (3, 799),
    (127, 512),
    (127, 513),
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (256, 512),
    (1023, 1024),
)
OUTPUT_PAIRS = (
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (256, 512),
    (512, 256),
    (1024, 1024),
    (1023, 1024),
    (1024, 1023),
    (2048, 2048),
)
SPLIT_PAIRS = ((3, 1024), (1, 339), (64, 800), (3, 799), (64, 2048), (16, 20000), (16, 100000), (128, 128), (256, 256))
V3_PAIRS = ((1, 1), (239, 1), (799, 3), (384, 256), (640, 128), (4096, 4096), (4224, 4224), *CAUSAL_PAIRS)


def swapped(pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    return pairs + tuple((b, a) for a, b in pairs)


def without(*dims: int) -> tuple[int, ...]:
    return tuple(d for d in DIMS if d not in dims)


@dataclass(frozen=True)
class Table:
    """One of upstream's parametrised tests: its axes, and how much error it allows."""

    name: str
    batch: int
    heads: tuple[tuple[int, int], ...]  # (heads, heads_k)
    axes: dict[str, tuple[Any, ...]]
    varlen: bool = False
    out_factor: float = 2.0
    grad_factor: float = 2.0
    out_slack: float = 0.0
    grad_slack: float = 0.0
    representation: bool = False  # upstream v3's slack on top

    def __len__(self) -> int:
        return len(self.heads) * int(np.prod([len(values) for values in self.axes.values()]))

    def __getitem__(self, index: int) -> Case:
        case: Case = {}
        for name, values in [("heads", self.heads), *self.axes.items()]:
            index, position = divmod(index, len(values))
            case[name] = values[position]
        return case


COMMON = {"dtype": HALF, "causal": FLAG, "local": FLAG, "alibi": FLAG, "deterministic": FLAG}
NO_SOFTCAP = {"softcap_and_dropout": tuple((0.0, p) for p in DROPOUT)}
SOFTCAP = {"softcap_and_dropout": ((0.0, 0.0), (0.0, 0.17), (50.0, 0.0))}
MHA_MQA_GQA = ((6, 6), (6, 1), (6, 2))
SQUARE = tuple((s, s) for s in SEQLENS)
VARLEN_SQUARE = tuple((s, s) for s in VARLEN_SEQLENS)
CAUSAL_AXES = {"dtype": HALF, "local": FLAG, "causal": (True,), "dim": DIMS, "seqlens": swapped(CAUSAL_PAIRS)}

TABLES = (
    Table("qkvpacked", 4, ((9, 9),), COMMON | NO_SOFTCAP | {"dim": DIMS, "seqlens": SQUARE}),
    Table("varlen_qkvpacked", 5, ((6, 6),), COMMON | NO_SOFTCAP | {"dim": without(40, 111), "seqlens": VARLEN_SQUARE}, True),
    Table(
        "output",
        4,
        MHA_MQA_GQA,
        COMMON | SOFTCAP | {"kvpacked": FLAG, "dim": without(80), "seqlens": OUTPUT_PAIRS},
        grad_factor=3.0,
    ),
    Table(
        "varlen_output",
        4,
        MHA_MQA_GQA,
        COMMON | SOFTCAP | {"kvpacked": FLAG, "dim": without(40), "seqlens": ((1, 147), *OUTPUT_PAIRS)},
        True,
        grad_factor=3.0,
    ),
    Table("causal", 8, ((9, 9),), CAUSAL_AXES, out_slack=1e-5, grad_slack=1e-5),
    Table("varlen_causal", 8, ((9, 9),), CAUSAL_AXES, True, out_slack=1e-5, grad_slack=1e-5),
    Table(
        "splitkv",
        1,
        ((12, 12),),
        COMMON | {"dim": DIMS, "seqlens": swapped(SPLIT_PAIRS)},
        out_slack=1e-5,
        grad_slack=2e-4,
    ),
    Table(
        "bwd_overflow",
        2,
        ((5, 5),),
        {"dtype": HALF, "causal": FLAG, "dim": (16, 32, 64), "seqlens": tuple((s, s) for s in (1, 2, 5, 17, 128))},
        grad_factor=5.0,
        grad_slack=1e-3,
    ),
    Table(
        "v3_output",
        2,
        MHA_MQA_GQA,
        {"dtype": HALF, "causal": FLAG, "local": FLAG, "softcap_and_dropout": ((0.0, 0.0), (15.0, 0.0))}
        | {"dim": (64, 96, 128, 192, 256), "seqlens": V3_PAIRS},
        representation=True,
    ),
)


def cost(table: Table, case: Case) -> float:
    """Multiplications of the forward pass of one batch item."""
    seqlen_q, seqlen_k = case["seqlens"]
    return 2.0 * case["heads"][0] * seqlen_q * seqlen_k * case["dim"]


def describe(table: Table, case: Case) -> str:
    parts = [table.name]
    for name, value in case.items():
        if isinstance(value, bool):
            parts += [name] if value else []
        elif isinstance(value, tuple):
            parts.append(name[0] + "x".join(str(v) for v in value))
        else:
            parts.append(name_of(value) if name == "dtype" else f"{name[0]}{value}")
    return "-".join(parts)


CHEAP = 3e8
DEFAULT_SAMPLE = 14  # of each table
PAIRS_PER_CASE = 500_000  # (query, key) pairs that are checked, but for a single head that has more


def default_sample() -> Iterator[Any]:
    for table in TABLES:
        draw = random.Random(table.name)
        chosen: dict[str, Case] = {}
        while len(chosen) < DEFAULT_SAMPLE:
            case = table[draw.randrange(len(table))]
            if cost(table, case) <= CHEAP:
                chosen[describe(table, case)] = case
        yield from (pytest.param(table, case, 1, id=name) for name, case in chosen.items())


def full_sample() -> Iterator[Any]:
    fraction = float(os.environ.get("FRACTION", "0"))
    for table in TABLES:
        count = min(len(table), -(-int(len(table) * fraction * 1000) // 1000)) if fraction else 0
        for index in random.Random(f"full {table.name}").sample(range(len(table)), count):
            case = table[index]
            # Batch items are independent: a costly case takes fewer of them, so that the share of 0.02 ends within an hour.
            batch = max(1, min(table.batch, int(4e9 / cost(table, case))))
            yield pytest.param(table, case, batch, id=describe(table, case))


def arguments_of(table: Table, case: Case, batch: int, rng: np.random.Generator) -> dict[str, Any]:
    (heads, heads_k), dim, dtype = case["heads"], case["dim"], case["dtype"]
    seqlen_q, seqlen_k = case["seqlens"]
    softcap, dropout_p = case.get("softcap_and_dropout", (0.0, 0.0))
    overflow = table.name == "bwd_overflow"
    q_scale = softcap or (5.0 if overflow else 1.0)
    kv_scale = 3.0 if overflow else 1.0

    arguments: dict[str, Any] = {"causal": case.get("causal", False), "softcap": softcap}
    if table.varlen:  # as upstream's "random" padding: lengths up to 20 short of the longest
        lengths_q, lengths_k = (rng.integers(max(1, s - 20), s + 1, batch) for s in (seqlen_q, seqlen_k))
        rows_q, rows_k = (int(lengths_q.sum()),), (int(lengths_k.sum()),)
        arguments |= {
            "cu_seqlens_q": integers(0, *np.cumsum(lengths_q)),
            "cu_seqlens_k": integers(0, *np.cumsum(lengths_k)),
            "max_seqlen_q": seqlen_q,
            "max_seqlen_k": seqlen_k,
        }
    else:
        rows_q, rows_k = (batch, seqlen_q), (batch, seqlen_k)
    arguments["q"] = normal(rng, *rows_q, heads, dim, scale=q_scale, dtype=dtype)
    if case.get("kvpacked"):
        kv = normal(rng, *rows_k, 2, heads_k, dim, scale=kv_scale, dtype=dtype)
        arguments |= {"k": kv[..., 0, :, :], "v": kv[..., 1, :, :]}
    elif table.name.endswith("qkvpacked"):
        qkv = normal(rng, *rows_k, 3, heads, dim, dtype=dtype)
        if table.varlen:
            arguments |= {"cu_seqlens_q": arguments["cu_seqlens_k"]}
        arguments |= {name: qkv[..., i, :, :] for i, name in enumerate(("q", "k", "v"))}
    else:
        arguments |= {name: normal(rng, *rows_k, heads_k, dim, scale=kv_scale, dtype=dtype) for name in ("k", "v")}
    if case.get("local"):
        # A row that sees a single key has gradient 0, exactly so in the same-precision computation: no ratio to speak of.
        arguments["window_size"] = tuple(int(rng.integers(least, max(seqlen_k, least + 1))) for least in (1, 0))
    if case.get("alibi"):
        arguments["alibi_slopes"] = mx.array(rng.random((batch, heads)).astype(np.float32) * 0.3)
    if dropout_p:
        arguments |= {"dropout_p": dropout_p, "dropout_key": mx.array(rng.integers(0, 2**32, 2, np.uint32))}
    return arguments


@dataclass(frozen=True)
class Unit:
    """One batch item and one kv head with its query heads."""

    batch: int
    kv_head: int
    group: int

    @property
    def heads(self) -> slice:
        return slice(self.kv_head * self.group, (self.kv_head + 1) * self.group)

    def cut(self, x: Any, bounds: mx.array | None, heads: slice) -> Any:
        """A dense (batch, seq, heads, ..) or packed (total, heads, ..) tensor, cut to this unit as a batch of one."""
        if bounds is None:
            return x[self.batch : self.batch + 1, :, heads]
        begin, end = (int(bounds[self.batch + i]) for i in range(2))
        return x[begin:end, heads][None]

    def cut_lse(self, x: Any, bounds: mx.array | None) -> Any:
        if bounds is None:
            return x[self.batch : self.batch + 1, self.heads]
        begin, end = (int(bounds[self.batch + i]) for i in range(2))
        return x[self.heads, begin:end][None]


def cut_arguments(arguments: dict[str, Any], unit: Unit) -> dict[str, Any]:
    """The unit's own dense call."""
    bounds_q, bounds_k = arguments.get("cu_seqlens_q"), arguments.get("cu_seqlens_k")
    kv = slice(unit.kv_head, unit.kv_head + 1)
    packing = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    own = {name: value for name, value in arguments.items() if name not in packing}
    own |= {
        "q": unit.cut(arguments["q"], bounds_q, unit.heads),
        "k": unit.cut(arguments["k"], bounds_k, kv),
        "v": unit.cut(arguments["v"], bounds_k, kv),
    }
    if "alibi_slopes" in own:
        own["alibi_slopes"] = own["alibi_slopes"][unit.batch : unit.batch + 1, unit.heads]
    if "dropout_key" in own:
        first = unit.batch * arguments["q"].shape[-2]
        own["dropout_heads"] = np.arange(first + unit.heads.start, first + unit.heads.stop)[None]
    return own


def sampled_units(case: Case, batch: int, rng: np.random.Generator) -> list[Unit]:
    """All of a small call: upstream's rule is about the largest error of a call, which in one head of a few numbers is luck."""
    heads, heads_k = case["heads"]
    seqlen_q, seqlen_k = case["seqlens"]
    units = [Unit(b, kv_head, heads // heads_k) for b in range(batch) for kv_head in range(heads_k)]
    affordable = PAIRS_PER_CASE // (seqlen_q * seqlen_k * (heads // heads_k))
    chosen = rng.permutation(len(units))[: max(1, affordable)]
    return [units[i] for i in chosen]


def unit_results(
    arguments: dict[str, Any], cotangents: CallCotangents, got: oracle.Result, unit: Unit, rounding: oracle.Rounding
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """out, dq, dk and dv of a unit: ours, the float64 truth, the same-precision computation. Checks the LSE."""
    bounds_q, bounds_k = arguments.get("cu_seqlens_q"), arguments.get("cu_seqlens_k")
    own = cut_arguments(arguments, unit)
    own_cotangents = CallCotangents(unit.cut(cotangents.out, bounds_q, unit.heads), unit.cut_lse(cotangents.lse, bounds_q))
    want = expected(own, own_cotangents)
    same_precision = expected(own, own_cotangents, rounding)
    assert_close("lse", unit.cut_lse(got.lse, bounds_q), want.lse, 2e-5)
    kv = slice(unit.kv_head, unit.kv_head + 1)
    results = {"out": (unit.cut(got.out, bounds_q, unit.heads), want.out, same_precision.out)}
    for name, bounds, part in (("q", bounds_q, unit.heads), ("k", bounds_k, kv), ("v", bounds_k, kv)):
        mine = unit.cut(got.gradients[name], bounds, part)
        results[f"d{name}"] = (mine, want.gradients[name], same_precision.gradients[name])
    return results


def check_case(table: Table, case: Case, batch: int, rng: np.random.Generator) -> None:
    arguments = arguments_of(table, case, batch, rng)
    cotangents = cotangents_of(arguments, rng)
    cotangents = CallCotangents(cotangents.out, mx.zeros_like(cotangents.lse))  # upstream has no gradient through the LSE
    got = run(arguments | {"deterministic": case.get("deterministic", False)}, cotangents)

    rounding = ROUNDING[case["dtype"]]
    results = [unit_results(arguments, cotangents, got, unit, rounding) for unit in sampled_units(case, batch, rng)]

    def of_all_units(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mine, truth, pt = (np.concatenate([result[name][i].ravel() for result in results]) for i in range(3))
        return mine, truth, pt

    softcap = arguments["softcap"] > 0
    out_factor = 3.0 if table.representation and softcap else table.out_factor
    grad_factor = 3.0 if table.representation and softcap else table.grad_factor
    if table.name == "splitkv" and case["alibi"]:
        grad_factor = 8.0
    grad_slack = 3e-4 if table.representation and softcap else table.grad_slack

    for name in ("out", "dq", "dk", "dv"):
        mine, truth, pt = of_all_units(name)
        factor, slack = (out_factor, table.out_slack) if name == "out" else (grad_factor, grad_slack)
        if table.representation:
            slack += representation_slack(truth, rounding)
        assert_as_precise(name, mine, truth, pt, rounding, factor, slack)


def test_the_matrix_is_upstreams():
    assert sum(len(table) for table in TABLES) > 80_000


@pytest.mark.parametrize(("table", "case", "batch"), list(default_sample()))
def test_sample(rng, table, case, batch):
    check_case(table, case, batch, rng)


@pytest.mark.full
@pytest.mark.parametrize(("table", "case", "batch"), list(full_sample()))
def test_share_of_the_whole_matrix(rng, table, case, batch):
    check_case(table, case, batch, rng)


def test_varlen_overflow_gives_no_nan(rng):
    arguments = {"q": normal(rng, 256, 2, 64, dtype=mx.float16), "k": normal(rng, 3, 2, 64, dtype=mx.float16)}
    arguments |= {"v": arguments["k"], "cu_seqlens_q": integers(0, 76, 110, 256), "cu_seqlens_k": integers(0, 1, 2, 3)}
    result = run(arguments | {"max_seqlen_q": 256, "max_seqlen_k": 3}, cotangents_of(arguments, rng))
    assert np.all(np.isfinite(result.out))
    assert all(np.all(np.isfinite(gradient)) for gradient in result.gradients.values())


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("dropout_p", [0.17, 0.5])
def test_the_share_that_s_dmask_drops(rng, dropout_p, dtype):
    from flash_attn import flash_attn_func

    q, k, v = (normal(rng, 4, 200, 9, 64, dtype=dtype) for _ in range(3))
    _, _, S_dmask = flash_attn_func(q, k, v, dropout_p, return_attn_probs=True)
    dropped = np.signbit(to_numpy(S_dmask)).mean()
    assert abs(dropped - dropout_p) <= 0.01
