"""Upstream's matrices for flash_attn_with_kvcache: its shapes, features and tolerances, and smaller pages than it has.

By default a fixed, seeded sample of cheap cases of each table runs; with FRACTION set, `pytest -m full` runs more of each,
whatever their cost. The function is called on the whole tensors; the float64 truth is computed for one (sequence, kv head),
since no other element can depend on another's inputs.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kvcache_oracle import Result
from kvcache_support import CACHES, assert_attended, call_of, pack_queries, page, rotary
from support import error, integers, normal, to_numpy
from test_upstream_matrix import FLAG, Case, Table, describe

from flash_attn import flash_attn_with_kvcache

PAIRS = (
    (1, 128),
    (1, 339),
    (3, 1024),
    (64, 800),
    (64, 256),
    (3, 799),
    (64, 2048),
    (16, 20000),
    (1, 131072),
    (16, 131072),
    (128, 128),
)
MASKS_AND_KEYS = {"new_kv": FLAG, "causal": FLAG, "local": FLAG, "seqlen_new_eq_seqlen_q": FLAG}
ROTARY = {"interleaved": FLAG, "rotary_fraction": (0.0, 0.5, 1.0)}
PLACES = {"leftpad": FLAG, "batch_idx": FLAG}

TABLES = (
    Table(
        "kvcache",
        2,
        ((6, 6), (6, 1), (6, 3)),
        {"dtype": (mx.float16,), "splits": (1, 0), "alibi": FLAG}
        | MASKS_AND_KEYS
        | ROTARY
        | PLACES
        | {"page_size": (None, 1, 16, 128, 256), "dim": (32, 59, 64, 80, 128, 256), "seqlens": PAIRS},
        out_factor=3.0,
        out_slack=1e-5,
    ),
    Table(
        "v3_kvcache",
        5,
        ((6, 6), (6, 1), (6, 2)),
        {"dtype": (mx.bfloat16,), "splits": (1, 3, 0), "rotary_seqlens": FLAG, "varlen_q": FLAG, "chunk": FLAG}
        | MASKS_AND_KEYS
        | ROTARY
        | PLACES
        | {
            "page_size": (None, 1, 4, 128),
            "dims": ((64, 64), (64, 256), (64, 512), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)),
            "seqlens": (*(pair for pair in PAIRS if pair[1] < 131072), (256, 512), (2048, 3577)),
        },
        out_factor=2.0,
        out_slack=1e-5,
    ),
)


def is_a_case(case: Case) -> bool:
    """Upstream skips these too; where the last two would put a query, its versions disagree."""
    rotated = case["rotary_fraction"] > 0
    chunk = case.get("chunk", False)
    return (
        (case["new_kv"] or not rotated)
        and (rotated or not case.get("rotary_seqlens"))
        and not (chunk and rotated and not (case["causal"] or case["local"]))
    )


def elements(table: Table, case: Case) -> int:
    """Of the k cache of one sequence."""
    return case["seqlens"][1] * case["heads"][1] * dims_of(case)[0]


def cost(table: Table, case: Case) -> float:
    """Multiplications of one sequence."""
    seqlen_q, seqlen_k = case["seqlens"]
    return case["heads"][0] * seqlen_q * seqlen_k * sum(dims_of(case))


def dims_of(case: Case) -> tuple[int, int]:
    return case.get("dims", (case.get("dim"), case.get("dim")))


DEFAULT_SAMPLE = 60  # of each table
SHARE = 10_000  # cases of each table that a FRACTION of 1 runs: the tables have millions, the product of some 15 axes


def default_sample() -> Iterator[Any]:
    for table in TABLES:
        draw = random.Random(table.name)
        chosen: dict[str, Case] = {}
        while len(chosen) < DEFAULT_SAMPLE:
            case = table[draw.randrange(len(table))]
            if is_a_case(case) and cost(table, case) <= 1e8 and elements(table, case) <= 3e5:
                chosen[describe(table, case)] = case
        yield from (pytest.param(table, case, table.batch, id=name) for name, case in chosen.items())


def full_sample() -> Iterator[Any]:
    fraction = float(os.environ.get("FRACTION", "0"))
    for table in TABLES:
        for index in random.Random(f"full {table.name}").sample(range(len(table)), int(SHARE * fraction)):
            case = table[index]
            if is_a_case(case):  # sequences are independent: a costly case takes fewer of them
                batch = max(1, min(table.batch, int(4e9 / cost(table, case)), int(2e7 / elements(table, case))))
                yield pytest.param(table, case, batch, id=describe(table, case))


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Normal numbers, from MLX: numpy's would be float64, and a cache of the matrix may have 200 million."""
    return mx.random.normal(shape, dtype=dtype, key=mx.array(rng.integers(0, 2**32, 2, np.uint32)))


def arguments_of(case: Case, batch: int, rng: np.random.Generator) -> dict[str, Any]:
    (heads, heads_k), (dim, dim_v), dtype = case["heads"], dims_of(case), case["dtype"]
    seqlen_q, seqlen_k = case["seqlens"]
    rows = 2 * batch if case["batch_idx"] else batch
    arguments: dict[str, Any] = {
        "q": normal(rng, batch, seqlen_q, heads, dim, dtype=dtype),
        "k_cache": drawn(rng, (rows, seqlen_k, heads_k, dim), dtype),
        "v_cache": drawn(rng, (rows, seqlen_k, heads_k, dim_v), dtype),
        "causal": case["causal"],
        "num_splits": case["splits"],
    }
    if case["local"]:
        arguments["window_size"] = tuple(int(side) for side in rng.integers(0, seqlen_k, 2))
    seqlen_new = seqlen_q if case["seqlen_new_eq_seqlen_q"] else int(rng.integers(1, seqlen_q + 1))
    rotary_dim = int(case["rotary_fraction"] * dim) // 16 * 16
    if case["new_kv"]:
        room = seqlen_q if rotary_dim > 0 and (case["causal"] or case["local"]) else seqlen_new
        lengths = rng.integers(0, seqlen_k - room + 1, batch)
        arguments |= {"k": normal(rng, batch, seqlen_new, heads_k, dim, dtype=dtype)}
        arguments |= {"v": normal(rng, batch, seqlen_new, heads_k, dim_v, dtype=dtype)}
    else:
        lengths = rng.integers(1, seqlen_k + 1, batch)
    arguments["cache_seqlens"] = integers(*lengths)
    if rotary_dim > 0:
        slots = -(-seqlen_k // (case["page_size"] or 1)) * (case["page_size"] or 1)
        arguments = rotary(rng, arguments, rotary_dim, case["interleaved"], rows=slots)
        if case.get("rotary_seqlens"):
            arguments["rotary_seqlens"] = integers(*(lengths // 2))
    if case["leftpad"]:
        arguments["cache_leftpad"] = integers(*(rng.integers(0, max(1, n)) for n in lengths))
    if case["batch_idx"]:
        arguments["cache_batch_idx"] = integers(*rng.permutation(rows)[:batch])
    if case.get("alibi"):
        arguments["alibi_slopes"] = mx.array(rng.random((batch, heads)).astype(np.float32) * 0.3)
    if case.get("chunk"):
        arguments["attention_chunk"] = int(rng.integers(1, 2 * seqlen_k))
    if dim_v >= 256 and dim <= 64:
        arguments["qv"] = normal(rng, batch, seqlen_q, heads, dim_v, dtype=dtype)
    if case["page_size"]:
        arguments = page(rng, arguments, case["page_size"])
    if case.get("varlen_q"):
        arguments = pack_queries(arguments, [seqlen_q, *(int(n) for n in rng.integers(1, seqlen_q + 1, batch - 1))])
    return arguments


PER_SEQUENCE = ("cache_seqlens", "cache_leftpad", "rotary_seqlens")


def cut_caches(arguments: dict[str, Any], b: int, kv_head: int) -> dict[str, mx.array]:
    """One sequence's caches and one kv head of them; its pages in the order of its table."""
    row = int(arguments["cache_batch_idx"][b]) if "cache_batch_idx" in arguments else b
    index = arguments["block_table"][row] if "block_table" in arguments else slice(row, row + 1)
    return {name: arguments[name][index][:, :, kv_head : kv_head + 1] for name in CACHES}


def cut(arguments: dict[str, Any], b: int, kv_head: int) -> dict[str, Any]:
    """One sequence and one kv head with its query heads, as a call of its own."""
    heads_k = arguments["k_cache"].shape[2]
    group = arguments["q"].shape[-2] // heads_k
    heads, kv = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
    dropped = ("cache_batch_idx", "block_table", "cu_seqlens_q", "max_seqlen_q")
    own = {name: value for name, value in arguments.items() if name not in dropped}
    own |= cut_caches(arguments, b, kv_head)
    own |= {name: own[name][b : b + 1] for name in PER_SEQUENCE if name in own}
    own |= {name: cut_queries(arguments, own[name], b)[:, :, heads] for name in ("q", "qv") if name in own}
    own |= {name: own[name][b : b + 1, :, kv] for name in ("k", "v") if name in own}
    if "alibi_slopes" in own:
        own["alibi_slopes"] = own["alibi_slopes"][b : b + 1, heads]
    if "block_table" in arguments:
        own["block_table"] = mx.arange(len(own["k_cache"]), dtype=mx.int32)[None]
    return own


def cut_queries(arguments: dict[str, Any], x: Any, b: int) -> Any:
    """Sequence b's tokens of a tensor like q."""
    if "cu_seqlens_q" not in arguments:
        return x[b : b + 1]
    begin, end = (int(bound) for bound in arguments["cu_seqlens_q"][b : b + 2])
    return x[begin:end][None]


def check_case(table: Table, case: Case, batch: int, rng: np.random.Generator) -> None:
    arguments = arguments_of(case, batch, rng)
    heads, heads_k = case["heads"]
    b, kv_head = int(rng.integers(batch)), int(rng.integers(heads_k))
    call = call_of(cut(arguments, b, kv_head))

    out, lse = flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    mx.eval(out, lse, [arguments[name] for name in CACHES])
    group = slice(kv_head * heads // heads_k, (kv_head + 1) * heads // heads_k)
    rows_first_lse = lse.swapaxes(-1, -2)  # as q, for one way to cut
    caches = cut_caches(arguments, b, kv_head)
    got = Result(
        to_numpy(cut_queries(arguments, out, b)[:, :, group]),
        to_numpy(cut_queries(arguments, rows_first_lse, b)[:, :, group].swapaxes(-1, -2)),
        *(to_numpy(caches[name]) for name in CACHES),
    )

    want, same_precision = call.result(), call.result(call.stored)
    np.testing.assert_array_equal(got.v_cache, want.v_cache)
    np.testing.assert_allclose(got.k_cache, want.k_cache, rtol=1e-3 if case["dtype"] == mx.float16 else 1e-2, atol=1e-3)
    factor = 5.0 if case.get("alibi") else table.out_factor
    assert_attended(got, want, same_precision, call, factor, table.out_slack)
    if table.name == "v3_kvcache":
        rounded = call.stored(want.out)
        assert np.mean(np.abs(got.out - rounded)) <= 1.5 * np.mean(np.abs(same_precision.out - rounded)) + 1e-6


def test_the_matrix_is_upstreams():
    assert sum(len(table) for table in TABLES) > 2_000_000


@pytest.mark.parametrize(("table", "case", "batch"), list(default_sample()))
def test_sample(rng, table, case, batch):
    check_case(table, case, batch, rng)


@pytest.mark.full
@pytest.mark.parametrize(("table", "case", "batch"), list(full_sample()))
def test_share_of_the_whole_matrix(rng, table, case, batch):
    check_case(table, case, batch, rng)


@pytest.mark.parametrize("page_size", [None, 256])
def test_a_paged_cache_may_be_filled_to_its_last_slot(rng, page_size):
    """Upstream's test of capacity: exactly enough works; one more is refused (test_kvcache_errors.py)."""
    case: Case = {name: values[0] for name, values in TABLES[0].axes.items()} | {
        "heads": (6, 3),
        "dim": 64,
        "seqlens": (1, 512),
    }
    arguments = arguments_of(case | {"new_kv": True, "page_size": page_size}, 2, rng) | {"cache_seqlens": integers(511, 511)}
    call = call_of(cut(arguments, 1, 2))
    out = flash_attn_with_kvcache(**arguments)
    assert error(to_numpy(out)[1:, :, 4:], call.result().out) <= 1e-3
