"""The KV-cache benchmark on tiny shapes: what its rows say, and that its bytes are those of the arrays."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("rich", reason="the benchmark's tables need rich: pip install '.[bench]'")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
HEADER = "Config | Contig (ms) | Paged (ms) | Speedup | Contig MiB | Paged MiB | Memory savings"
ROW = re.compile(
    r"B(?P<batch>\d+) L(?P<live>\d+) M(?P<capacity>\d+) P(?P<page>\d+) H(?P<heads>\d+)(/(?P<heads_k>\d+))? D(?P<dim>\d+)"
    r" \| (?P<contig_ms>\d+\.\d{3}) \| (?P<paged_ms>\d+\.\d{3}) \| (?P<speedup>\d+\.\d{2})x"
    r" \| (?P<contig_mib>\d+\.\d) \| (?P<paged_mib>\d+\.\d) \| (?P<savings>\d+\.\d)x smaller"
)


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(BENCHMARKS / "benchmark_flash_attn_mlx.py"),
        "--kv-bench",
        "--kv-bench-iters",
        "1",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def issue_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Output and JSON of one run whose first config is the issue's own, with its defaults of heads, head dim and dtype."""
    path = tmp_path_factory.mktemp("benchmark") / "kv.json"
    done = run_benchmark(
        "--kv-batch-sizes", "1", "2", "--kv-live-lengths", "512", "500", "--kv-max-cache-lengths", "4096", "256",
        "--kv-page-sizes", "128", "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def rows_of(output: str) -> list[re.Match[str]]:
    lines = output.splitlines()
    return [row for line in lines[lines.index(HEADER) + 1 :] if (row := ROW.fullmatch(line))]


def test_every_config_that_fits_has_one_row_under_the_header(issue_run):
    output, results = issue_run
    configs = [row[0].split(" | ")[0] for row in rows_of(output)]
    assert configs == [f"B{b} L{live} M4096 P128 H8 D128" for b in (1, 2) for live in (512, 500)]
    assert [row["config"] for row in results["kv_bench"]] == configs


def test_the_issue_example_has_its_memory_columns(issue_run):
    assert rows_of(issue_run[0])[0][0].endswith(" | 16.0 | 2.0 | 8.0x smaller")


def test_paged_memory_is_whole_pages(issue_run):
    """500 tokens fill four pages of 128 no less than 512 do."""
    one, one_short, two, _ = rows_of(issue_run[0])
    assert one_short["paged_mib"] == one["paged_mib"]
    assert float(two["paged_mib"]) == 2 * float(one["paged_mib"])


def test_speedup_is_the_ratio_of_the_times(issue_run):
    output, results = issue_run
    for row, numbers in zip(rows_of(output), results["kv_bench"], strict=True):
        assert numbers["contiguous_ms"] > 0
        assert float(row["speedup"]) == pytest.approx(numbers["contiguous_ms"] / numbers["paged_ms"], abs=0.006)


def test_heads_head_dim_and_dtype_are_taken(tmp_path):
    path = tmp_path / "kv.json"
    done = run_benchmark(
        "--heads", "4", "--heads-k", "2", "--head-dim", "64", "--dtype", "float32", "--kv-batch-sizes", "1",
        "--kv-live-lengths", "512", "--kv-max-cache-lengths", "2048", "--kv-page-sizes", "16", "--kv-seqlen-q", "3",
        "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(done.stdout)
    assert row[0].startswith("B1 L512 M2048 P16 H4/2 D64 | ")
    assert row[0].endswith(" | 2.0 | 0.5 | 4.0x smaller")
    (numbers,) = json.loads(path.read_text())["kv_bench"]
    assert (numbers["dtype"], numbers["seqlen_q"]) == ("float32", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kv-live-lengths", "512", "--kv-max-cache-lengths", "256"), "no --kv-live-lengths fits"),
        (("--kv-page-sizes", "0"), "must be at least 1"),
        (("--kv-seqlen-q", "0"), "--kv-seqlen-q must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_make_no_sense_are_refused(arguments, message):
    done = run_benchmark(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("targets")


def decode_row(implementation: str = "ours", **values: object) -> dict:
    paged_time = {"16": 1.0, "128": 1.0} if implementation == "ours" else None
    row = {"label": "f16 B8", "dtype": "float16", "ms": 1.0, "of_read": 0.6, "times_float16": None, "paged_time": paged_time}
    return row | {"implementation": implementation} | values


def verdicts(found: list) -> dict[str, str]:
    return {target.what: target.verdict for target in found}


def test_a_decode_target_is_judged_by_the_worst_shape(targets):
    good, bad = decode_row(), decode_row(label="f16 B1", of_read=0.4, paged_time={"16": 1.06, "128": 1.0})
    what = "decode f16, of the memory read ceiling"
    assert verdicts(targets.evaluate_decode([good], {}))[what] == "met"
    found = verdicts(targets.evaluate_decode([good, bad], {}))
    assert found[what] == "missed"
    assert found["decode, page size 16, time over contiguous"] == "missed"
    assert found["decode, page size 128, time over contiguous"] == "met"


def test_a_decode_target_compares_with_pytorch_shape_by_shape(targets):
    rows = [decode_row(ms=1.0), decode_row("torch", ms=1.5), decode_row(label="f16 B1", ms=1.0)]
    what = "decode f16, times faster than PyTorch"
    assert verdicts(targets.evaluate_decode(rows, {}))[what] == "met"
    rows.append(decode_row("torch", label="f16 B1", ms=0.9))
    assert verdicts(targets.evaluate_decode(rows, {}))[what] == "missed"
    assert verdicts(targets.evaluate_decode(rows[:1], {}))[what] == "not measured"


@pytest.mark.parametrize(("large", "verdict"), [(140.0, "met"), (141.0, "missed")])
def test_an_append_may_cost_a_fifth_and_20_microseconds_more_in_a_large_cache(targets, large, verdict):
    (found,) = [t for t in targets.evaluate_decode([], {"1024": 100.0, "131072": large}) if t.what.startswith("append")]
    assert found.verdict == verdict


@pytest.mark.parametrize("level", ["avx512_amx", "avx512_bf16", "avx512", "avx2", "neon", "baseline"])
def test_every_level_has_a_float32_ceiling(monkeypatch, level):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    ceilings = importlib.import_module("ceilings")
    measured = {"baseline": 1.0, "neon": 2.0, "avx2": 3.0, "avx512": 4.0, "avx512_bf16": 5.0}
    vectors = "avx512" if level.startswith("avx512") else level
    assert ceilings.Ceilings(Path(), threads=1, level=level, gflops=measured).fma_gflops == measured[vectors]
