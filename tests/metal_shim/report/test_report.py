"""The report's own arithmetic, and that a bound which is exceeded fails and names its row."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS / folder) for folder in ("python", "metal_shim/lint", "metal_shim/tests")]

import needed  # noqa: E402
import pytest  # noqa: E402
from cases import CASES, Case  # noqa: E402
from counted import MOST_THREADGROUP_BYTES, Row, rows_of, steel_row  # noqa: E402
from metal_support import shim  # noqa: E402

CAUSAL = Case("causal", 64, 64, causal=True, head_dim=32, heads=2)


def row(**changes: float) -> Row:
    fine = {"flops": 1.0, "bytes": 1.0, "threadgroup_bytes_a_flop": 0.1, "barriers_a_block": 2.0, "instructions_a_product": 4.0}
    sizes = {"threadgroup_bytes": 1024, "registers": 100, "stack_bytes": 0, "text_bytes": 1000}
    return Row(**({"case": "some case", "kernel": "forward"} | fine | sizes | changes))


def test_needed_flops_are_of_visible_scores():
    pairs = 64 * 65 // 2
    assert needed.flops(CAUSAL, "forward") == 2 * 2 * pairs * (32 + 32)
    assert needed.flops(CAUSAL, "backward_dkv") == 2 * 2 * pairs * 4 * 32


def test_needed_rows_are_those_that_a_block_sees():
    assert list(needed.ranges(CAUSAL, "forward", 32, 1)) == [(0, 32), (0, 64)]
    assert list(needed.ranges(CAUSAL, "backward_dkv", 32, 1)) == [(0, 64), (32, 64)]
    window = Case("window", 64, 64, window=(8, 0))
    assert list(needed.ranges(window, "forward", 32, 1)) == [(0, 32), (24, 64)]
    assert needed.streamed_bytes(window, "forward", 32, 1) == (32 + 40) * 2 * 64 * 2
    assert needed.streamed_blocks(window, "forward", 32, 16, 1) == 2 + 3


def test_queries_of_a_group_are_packed_rows():
    grouped = Case("grouped", 16, 16, causal=True, heads=4)
    assert list(needed.ranges(grouped, "forward", 32, 4)) == [(0, 8), (0, 16)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("flops", 1.06), ("bytes", 1.03), ("threadgroup_bytes", MOST_THREADGROUP_BYTES + 1), ("text_bytes", 15 * 1024 + 1)],
)
def test_an_exceeded_bound_names_its_row(name, value):
    case = Case("some case", 64, 64, flops=1.05, bytes=1.02)
    assert row().exceeded(case) == []
    (complaint,) = row(**{name: value}).exceeded(case)
    assert complaint.startswith(f"some case, forward: {name} ")


def test_every_case_has_a_bound():
    assert all(case.flops or case.bytes for case in CASES)


def test_counts_of_mlx_and_of_ours():
    """MLX's kernel computes whole 32 x 32 tiles: 7 x 11 of them for 200 x 333 scores."""
    shim()
    case = next(case for case in CASES if case.name == "ragged 200 x 333")
    assert steel_row(case).flops == pytest.approx(7 * 32 * 11 * 32 / (200 * 333), rel=1e-3)
    (ours,) = rows_of(case)
    # Ours leaves out what lies in no 8 x 8 tile.
    assert ours.flops == pytest.approx(200 * 336 / (200 * 333), rel=1e-3)
    assert ours.bytes == 1.0
