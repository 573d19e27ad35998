"""A kernel passes as it is, and each bug planted in it is found: so a green run means something."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import metal_shim
import numpy as np
import pytest

TEXT = (Path(__file__).parent / "small_attention.metal").read_text()
PAGE, DIM, ROWS = 16, 16, 32

BARRIER_BEFORE = "threadgroup_barrier(mem_flags::mem_threadgroup);  // the last block is read"
BARRIER_AFTER = "threadgroup_barrier(mem_flags::mem_threadgroup);  // this block is there"
PRESENT = "page >= 0 && page < pages"
K_LOAD = "*(const device half4*)(k_pages + from)"
LSE = "if ((lane & 9u) == 0u) lse[row]"
FIRST_STATE = "float m = -1.0e30f;"
K_ARRAY = "threadgroup half K["
ZEROS_OF_V = "*(threadgroup half4*)(V + key * row_length + column) = half4(half(0.0f));"


def problem():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((ROWS, DIM)).astype(np.float16)
    k, v = (rng.standard_normal((5, PAGE, DIM)).astype(np.float16) for _ in range(2))
    table = np.array([-1, 3, 0, 4, 1 << 20], np.int32)  # the first and the last stand for no keys
    keys = 4 * PAGE - 5
    return q, k, v, table, keys


def run(text=TEXT, mode="hooks", seed=0, threads=64, rows=ROWS):
    q, k, v, table, keys = problem()
    sizes = np.array([len(table), keys, len(k)], np.int32)
    out, lse = np.zeros((rows, DIM), np.float32), np.zeros(rows, np.float32)
    buffers = [("q", q, False), ("k_pages", k, False), ("v_pages", v, False), ("table", table, False), ("sizes", sizes, False)]
    buffers += [("out", out, True), ("lse", lse, True)]
    grid = {"grid": (ROWS // 16 * threads, 1, 1), "threadgroup": (threads, 1, 1)}
    report = metal_shim.run_text(text, "small_attention", buffers, **grid, mode=mode, seed=seed)
    return out, lse, report


def expected():
    q, k, v, table, keys = problem()
    ids = [(i, page) for i, page in enumerate(table) if 0 <= page < len(k)]
    positions = np.concatenate([np.arange(i * PAGE, (i + 1) * PAGE) for i, _ in ids])
    k, v = (np.concatenate([x[page] for _, page in ids]).astype(np.float64)[positions < keys] for x in (k, v))
    scores = q.astype(np.float64) @ k.T * 0.25
    p = np.exp(scores)
    return p @ v / p.sum(1, keepdims=True), np.log(p.sum(1))


@pytest.mark.parametrize("mode", ["fast", "hooks"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_text_passes(mode, seed):
    out, lse, report = run(mode=mode, seed=seed)
    np.testing.assert_allclose(out, expected()[0], atol=1e-5)
    np.testing.assert_allclose(lse, expected()[1], atol=1e-5)
    assert report["matrix_flops"] == 4 * ROWS * 5 * PAGE * DIM
    assert report["barriers"] == ROWS // 16 * 5 * 2
    assert report["threadgroup_bytes_allocated"] == 2 * PAGE * (DIM + 8) * 2
    if mode == "hooks":
        groups = ROWS // 16
        assert report["device_bytes_read"]["q"] == ROWS * DIM * 2
        assert report["device_bytes_read"]["k_pages"] == groups * 3 * PAGE * DIM * 2
        assert report["device_bytes_written"] == {
            **dict.fromkeys(["q", "k_pages", "v_pages", "table", "sizes"], 0),
            "out": ROWS * DIM * 4,
            "lse": ROWS * 4,
        }
        assert report["threadgroup_bytes_written"] == groups * 5 * 2 * PAGE * DIM * 2
        assert report["threadgroup_bytes_read"] == groups * 5 * 2 * 2 * PAGE * DIM * 2


class Bug(NamedTuple):
    name: str
    old: str
    new: str
    finding: str
    about: str = ""  # also in the message


# Found in both modes.
PLAIN = [
    Bug("wild_page_id", PRESENT, "page >= 0", "out of bounds", "buffer k_pages, byte 53687"),
    Bug("divergent_simd_operation", "m = highest;", "m = place.row < 4 ? row_max(highest) : highest;", "divergence"),
    Bug("divergent_barrier", BARRIER_BEFORE, f"if (place.row < 4) {BARRIER_BEFORE}", "divergence"),
    Bug("barrier_in_one_simdgroup", BARRIER_BEFORE, f"if (simdgroup_index == 0) {BARRIER_BEFORE}", "divergence"),
    Bug("lane_returns_early", FIRST_STATE, f"{FIRST_STATE} if (lane == 5) return;", "divergence", "returned"),
    Bug("simdgroup_returns_early", FIRST_STATE, f"{FIRST_STATE} if (simdgroup_index == 1) return;", "divergence", "returned"),
    Bug("shuffle_from_no_lane", "simd_shuffle_xor(x, 8)", "simd_shuffle_xor(x, 40)", "shuffle", "of 32"),
    Bug("array_one_row_short", "half K[keys_per_page *", "half K[(keys_per_page - 1) *", "out of bounds", "array K"),
    Bug("last_array_one_row_short", "half V[keys_per_page *", "half V[(keys_per_page - 1) *", "out of bounds", "array V"),
    Bug("input_written", LSE, f"const_cast<device half*>(q)[0] = half(0.0f); {LSE}", "read-only", "buffer q"),
    Bug("too_much_threadgroup_memory", K_ARRAY, f"threadgroup float big[8192];\n  {K_ARRAY}", "threadgroup memory", "array K"),
    Bug("division_by_zero", "page * keys_per_page", "keys / (blocks - 5) * keys_per_page", "undefined", "division by zero"),
    Bug("unknown_word", "row_sum(sum)", "metal::simd_sum_of_row(sum)", "compile", "simd_sum_of_row"),
]

# Found by the hooks alone. What is read too early has its old value, or none.
SUBTLE = [
    Bug("missing_barrier_before_overwriting", BARRIER_BEFORE, "", "race", "threadgroup array K"),
    Bug("missing_barrier_before_reading", BARRIER_AFTER, "", "(race|uninitialised)", "threadgroup array K"),
    Bug("barrier_weakened", BARRIER_AFTER, BARRIER_AFTER.replace("mem_threadgroup", "mem_none"), "race", "threadgroup array K"),
    Bug("barrier_of_other_memory", BARRIER_AFTER, BARRIER_AFTER.replace("mem_threadgroup", "mem_device"), "race", "array K"),
    Bug("barrier_of_one_simdgroup", BARRIER_AFTER, f"simdgroup_{BARRIER_AFTER[12:]}", "(race|uninitialised)", "array K"),
    Bug("page_minus_one", PRESENT, "page < pages", "out of bounds", "buffer k_pages, byte -"),
    Bug("uninitialised_threadgroup_read", ZEROS_OF_V, "", "uninitialised", "threadgroup array V"),
    Bug("two_writers_of_one_row", LSE, "lse[row]", "race", "buffer lse"),
    Bug("two_threadgroups_write_one_row", "int(group.x) * 16 +", "", "race", "another threadgroup"),
    Bug("misaligned_load", K_LOAD, K_LOAD.replace("from", "from + 1"), "misaligned"),
    Bug("output_not_written", LSE, LSE.replace("if (", "if (row != 9 && "), "unwritten", "buffer lse, byte 36 of 128"),
    Bug("output_read_before_written", LSE, f"l += lse[row]; {LSE}", "uninitialised", "buffer lse"),
    Bug("private_array_overrun", "O[d] *= correction;", "O[d + blocks - 4] *= correction;", "out of bounds", "private array"),
    Bug("overflow_of_int", "= (page * keys", "= (page * 1000000000 * keys", "undefined", "overflow"),
]


@pytest.mark.parametrize(
    ("bug", "mode"),
    [pytest.param(bug, "hooks", id=f"{bug.name}-hooks") for bug in PLAIN + SUBTLE]
    + [pytest.param(bug, "fast", id=f"{bug.name}-fast") for bug in PLAIN],
)
def test_planted_bug_is_found(bug, mode):
    assert bug.old in TEXT
    with pytest.raises(RuntimeError, match=rf"^{bug.finding}: ") as error:
        run(TEXT.replace(bug.old, bug.new), mode)
    assert bug.about in str(error.value)


def test_wrong_lane_formula_gives_wrong_numbers():
    """Every address is legal: the numbers show it."""
    row, column = "short((quad & 4) +", "short((quad & 2) * 2 + (short(lane) % 2"
    assert row in TEXT
    assert column in TEXT
    text = TEXT.replace(column, "short((quad & 4) + (short(lane) % 2").replace(row, "short((quad & 2) * 2 +", 1)
    out, _, _ = run(text, "fast")
    assert not np.allclose(out, expected()[0], atol=1e-2)


@pytest.mark.parametrize("bug", [bug for bug in SUBTLE if "race" in bug.finding], ids=lambda bug: bug.name)
def test_races_are_found_in_any_order(bug):
    for seed in range(1, 6):
        with pytest.raises(RuntimeError, match=rf"^{bug.finding}: "):
            run(TEXT.replace(bug.old, bug.new), seed=seed)


def test_a_finding_says_where():
    text = TEXT.replace(PRESENT, "page < pages")
    line = 1 + text[: text.index(K_LOAD)].count("\n")
    with pytest.raises(RuntimeError, match=rf"thread \(63, 0, 0\) of threadgroup \(0, 0, 0\).*small_attention.metal:{line}"):
        run(text)


@pytest.mark.parametrize("mode", ["fast", "hooks"])
def test_the_shim_goes_on_after_a_finding(mode):
    with pytest.raises(RuntimeError, match="out of bounds"):
        run(TEXT.replace(PRESENT, "page >= 0"), mode)
    np.testing.assert_allclose(run(mode=mode)[0], expected()[0], atol=1e-5)
