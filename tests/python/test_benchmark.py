"""The benchmark on tiny shapes: what its rows say, that its bytes are those of the arrays, and how targets are judged."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
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


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("benchmark_flash_attn_mlx.py", "--kv-bench", "--kv-bench-iters", "1", *arguments)


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
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def targets(benchmark_module) -> ModuleType:
    return benchmark_module("targets")


# ---- what is measured


def test_quick_leaves_out_nothing_that_is_not_in_the_whole_tables(benchmark_module):
    cases = benchmark_module("cases")
    sections = list(cases.SECTIONS)
    chosen, omitted = cases.section_cases(sections, quick=True)
    whole, nothing = cases.section_cases(sections, quick=False)
    assert nothing == []
    assert sorted(map(repr, chosen + omitted)) == sorted(map(repr, whole))


def test_every_case_of_the_tables_with_a_bar_is_in_the_quick_ones(benchmark_module):
    chosen, _ = benchmark_module("cases").section_cases(["forward", "backward", "short", "features"], quick=True)
    dims = {(case.seqlen, case.head_dim, case.causal) for case in chosen if case.section == "forward"}
    assert dims == {(s, d, c) for d in (64, 96, 128, 256) for s, c in ((2048, True), (2048, False), (512, True))}
    assert {case.seqlen for case in chosen if case.section == "short"} == {128, 256}
    features = {(case.feature, case.backward) for case in chosen if case.section == "features"}
    assert ("mask of each head", False) in features
    assert {("softcap", True), ("window", True), ("sinks", True), ("varlen", True)} <= features


def test_two_features_are_both_in_the_call(benchmark_module):
    case = benchmark_module("case")
    both = case.with_features(case.Case("pairs"), "ALiBi", "window")
    assert (both.feature, both.alibi, both.window) == ("ALiBi + window", True, (512, 0))


def test_pairs_that_a_window_hides_are_not_counted(benchmark_module):
    case = benchmark_module("case")
    assert case.Case("", seqlen=4, window=(1, 0)).visible_pairs() == 1 + 2 + 2 + 2
    assert case.Case("", seqlen=4).visible_pairs() == 10
    assert case.Case("", seqlen=4, causal=False, batch=2).visible_pairs() == 32


def tiny_pool(benchmark_module, monkeypatch: pytest.MonkeyPatch, dtype: str):
    cache_pool = benchmark_module("cache_pool")
    monkeypatch.setattr(cache_pool, "BLOCK_TOKENS", 256)
    return cache_pool.CachePool(dtype, least_bytes=1, heads_k=2, head_dim=32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_pages_are_timed_against_the_same_contiguous_cache(benchmark_module, monkeypatch, dtype):
    decode, ours = benchmark_module("decode"), benchmark_module("peers.ours").Ours(1)
    monkeypatch.setattr(decode, "PAIRS", 3)
    case = benchmark_module("case").DecodeCase(1, 128, dtype, heads=4, heads_k=2, head_dim=32)
    row = decode.run_paged(case, tiny_pool(benchmark_module, monkeypatch, dtype), ours)
    assert list(row["paged_time"]) == ["pages of 16", "pages of 16, MLX's", "pages of 128", "pages of 128, MLX's"]
    assert all(ratio > 0 for ratio in row["paged_time"].values())


def test_decode_in_cache_is_the_time_of_one_call(benchmark_module, monkeypatch):
    decode, case = benchmark_module("decode"), benchmark_module("case")
    tiny = case.DecodeCase(1, 64, "float32", heads=4, heads_k=2, head_dim=32, in_cache=True)
    monkeypatch.setattr(decode, "decode_cases", lambda dtype: [tiny])
    peers = benchmark_module("peers").make_peers(threads=1)
    module = benchmark_module("ceilings")
    ceilings = module.Ceilings(module.build(), threads=1, level="baseline")
    pool = tiny_pool(benchmark_module, monkeypatch, "float32")
    ((rows, missing),) = decode.run_decode(pool, None, peers, ("sdpa",), 1, ceilings.reading)
    assert [row["implementation"] for row in rows] == ["ours", "sdpa"]
    assert missing == {}
    assert rows[0]["bytes"] == 2 * 64 * 2 * 32 * 4
    assert rows[0]["gbs"] == pytest.approx(rows[0]["bytes"] / rows[0]["ms"] * 1e-6)
    assert rows[0]["read_gbs"] > 0
    assert rows[0]["of_read"] > 0


def test_a_ratio_of_rounds_compares_the_times_of_one_moment(benchmark_module):
    timing = benchmark_module("timing")
    peak = timing.Peak(0, None)
    read = timing.Timing(1.0, 4, peak, rounds=[1.0, 4.0, 4.0])
    ours = timing.Timing(1.5, 4, peak, rounds=[2.0, 8.0, 8.0])
    assert timing.median_of_rounds(read, ours) == 0.5
    once = timing.Timing(3.0, 1, peak)
    assert timing.median_of_rounds(once, ours) == 2.0


def test_only_a_call_that_times_itself_says_how_long_it_took(benchmark_module):
    timing = benchmark_module("timing")

    class Quarter(timing.SelfTimed):
        def __call__(self) -> float:
            return 0.25

    assert timing.seconds_of(Quarter(), settle=0.0) == 0.25
    assert timing.seconds_of(lambda: ["what a peer gives"], settle=0.0) < 0.25


def test_a_peer_that_is_not_installed_is_named_and_skipped(benchmark_module, monkeypatch):
    torch = benchmark_module("peers.pytorch").PyTorch(threads=1)
    monkeypatch.setattr(torch, "packages", ("no_such_package",))
    case = benchmark_module("case").Case("forward", heads=1, heads_k=1, seqlen=8, head_dim=8)
    peers = {"ours": benchmark_module("peers.ours").Ours(threads=1), "torch": torch}
    rows, missing = benchmark_module("attention").run_case(case, peers, ("torch",), iters=1)
    assert [row["implementation"] for row in rows] == ["ours"]
    assert "not installed" in missing["torch"]


# ---- targets


def case_row(implementation: str = "ours", **values: object) -> dict:
    row = {
        "section": "forward", "feature": "plain", "label": "f32 S2048 D128 causal", "steps": "forward", "seqlen": 2048,
        "head_dim": 128, "causal": True, "ceiling": "f32 FMA", "of_ceiling": 0.82, "of_plain": None, "ms": 10.0,
    }  # fmt: skip
    return row | {"implementation": implementation} | values


def decode_row(implementation: str = "ours", **values: object) -> dict:
    row = {
        "label": "f16 B8", "dtype": "float16", "ms": 1.0, "of_read": 0.8, "of_fma": 0.3, "heads_first": False,
        "in_cache": False, "times_float32": None, "flops": 1e6, "bytes": 1e6, "read_gbs": 30.0,
    }  # fmt: skip
    return row | {"implementation": implementation} | values


def verdicts(found: list) -> list[str]:
    return [target.verdict for target in found]


@pytest.mark.parametrize(
    ("values", "need"),
    [
        ({}, 0.82),
        ({"causal": False}, 0.88),
        ({"seqlen": 512}, 0.75),
        ({"section": "backward", "steps": "forward+backward"}, 0.80),
        ({"section": "backward", "steps": "forward+backward", "head_dim": 256}, 0.74),
        ({"section": "half"}, 0.82),
        ({"section": "half", "ceiling": "AMX"}, 0.65),
        ({"section": "short", "causal": False}, 0.75),
        ({"section": "pairs", "of_plain": 0.9}, 0.85),
        ({"section": "features", "feature": "mask of each head", "of_plain": 0.9}, 0.80),
    ],
)
def test_each_cell_has_its_own_bar(targets, values, need):
    (found,) = targets.evaluate_cases([case_row(**values)], has_bf16=False)
    assert found.need == need


def test_the_fastest_peer_is_the_one_to_beat(targets):
    rows = [case_row(of_ceiling=0.5), case_row("torch", ms=15.0), case_row("onnxruntime", ms=11.0)]
    bar, ahead = targets.evaluate_cases(rows, has_bf16=False)
    assert bar.verdict == "missed"
    assert (ahead.against, ahead.need, ahead.got) == ("x ONNX Runtime", pytest.approx(1.2), pytest.approx(1.1))


def test_causal_prefill_at_its_bar_need_not_be_more_than_ahead(targets):
    """At the bar and 1.1 times the peer: 1.2 would be more than the table asks for."""
    found = targets.evaluate_cases([case_row(), case_row("torch", ms=11.0)], has_bf16=False)
    assert verdicts(found) == ["met", "met"]
    behind = targets.evaluate_cases([case_row(), case_row("torch", ms=9.0)], has_bf16=False)
    assert verdicts(behind) == ["met", "missed"]


@pytest.mark.parametrize(("has_bf16", "need"), [(False, 5.0), (True, 1.2)])
def test_16_bit_backward_is_five_times_ahead_where_no_chip_multiplies_16_bits(targets, has_bf16, need):
    both = {"section": "half", "steps": "forward+backward"}
    _, ahead = targets.evaluate_cases([case_row(**both), case_row("torch", **both)], has_bf16)
    assert ahead.need == need


def decode_verdicts(targets: ModuleType, rows: list[dict]) -> list[str]:
    return verdicts(targets.evaluate_decode(rows, fma_gflops=100.0, cache_gbs=50.0, empty_op_us=5.0))


def test_16_bit_decode_may_be_limited_by_arithmetic(targets):
    assert decode_verdicts(targets, [decode_row()]) == ["met"]
    assert decode_verdicts(targets, [decode_row(of_read=0.5)]) == ["missed"]
    assert decode_verdicts(targets, [decode_row(of_read=0.5, of_fma=0.66)]) == ["met"]
    assert decode_verdicts(targets, [decode_row(dtype="float32", of_read=0.5, of_fma=0.66)]) == ["missed"]


def test_decode_is_twice_as_fast_as_the_fastest_peer_or_at_the_read_ceiling(targets):
    assert decode_verdicts(targets, [decode_row(), decode_row("torch", ms=2.1)]) == ["met", "met"]
    assert decode_verdicts(targets, [decode_row(), decode_row("torch", ms=1.01)]) == ["met", "missed"]
    assert decode_verdicts(targets, [decode_row(of_read=0.86), decode_row("torch", ms=1.01)]) == ["met", "met"]


def test_nothing_is_promised_of_caches_heads_first_and_of_mlxs_codes(targets):
    assert decode_verdicts(targets, [decode_row(heads_first=True)]) == []
    assert decode_verdicts(targets, [decode_row(dtype="mlx4")]) == []


def test_decode_in_cache_is_judged_in_time(targets):
    """1 MB at 50 GB/s is 20 us, 1 MFLOP at 100 GFLOP/s 10 us: 1.5 * 20 + 5."""
    assert decode_verdicts(targets, [decode_row(in_cache=True, ms=0.0349)]) == ["met"]
    assert decode_verdicts(targets, [decode_row(in_cache=True, ms=0.0351)]) == ["missed"]


def test_each_page_size_is_judged(targets):
    found = targets.evaluate_paged([{"label": "f16 B8", "paged_time": {"pages of 16": 1.05, "pages of 128": 1.04}}])
    assert verdicts(found) == ["missed", "met"]


@pytest.mark.parametrize(("large", "verdict"), [(140.0, "met"), (141.0, "missed")])
def test_an_append_may_cost_a_fifth_and_20_microseconds_more_in_a_large_cache(targets, large, verdict):
    assert verdicts(targets.evaluate_append({"1024": 100.0, "131072": large})) == [verdict]


def test_two_threads_gain_what_the_ceiling_gains(targets):
    row = {"label": "f32", "steps": "forward", "gain": 1.8}
    assert verdicts(targets.evaluate_threads([row], None, fma_gain=1.85)) == ["met"]
    assert verdicts(targets.evaluate_threads([row], None, fma_gain=2.0)) == ["missed"]


# ---- ceilings


LEVELS = ["avx512_amx", "avx512_bf16", "avx512", "avx2", "neon", "baseline"]
MEASURED = {"baseline": 1.0, "neon": 2.0, "avx2": 3.0, "avx512": 4.0, "avx512_bf16": 5.0, "avx512_amx": 6.0}


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_has_a_float32_ceiling(benchmark_module, level):
    ceilings = benchmark_module("ceilings")
    vectors = "avx512" if level.startswith("avx512") else level
    assert ceilings.Ceilings(Path(), threads=1, level=level, gflops=MEASURED).fma_gflops == MEASURED[vectors]


@pytest.mark.parametrize(
    ("level", "dtype", "steps", "ceiling"),
    [
        ("avx512_amx", "bfloat16", "forward", 6.0),
        ("avx512_amx", "bfloat16", "forward+backward", 4.0),
        ("avx512_amx", "float16", "forward", 4.0),
        ("avx512_bf16", "bfloat16", "forward+backward", 5.0),
        ("avx512", "bfloat16", "forward", 4.0),
        ("avx2", "bfloat16", "forward", 3.0),
    ],
)
def test_a_case_is_held_against_what_multiplies_in_it(benchmark_module, level, dtype, steps, ceiling):
    ceilings = benchmark_module("ceilings").Ceilings(Path(), threads=1, level=level, gflops=MEASURED)
    case = benchmark_module("case").Case("half", dtype=dtype, steps=steps)
    assert ceilings.by_name(ceilings.of(case)) == ceiling


# ---- what a run leaves


@pytest.fixture
def results(benchmark_module) -> dict:
    """Of a run whose numbers are made up: the shape of the JSON is that of benchmark_flash_attn_mlx.py."""
    shape = {"dtype": "float32", "gflops": 100.0, "once": False}
    cases = [case_row(**shape), case_row("torch", **shape | {"ms": 15.0})]
    cases.append(case_row(section="features", feature="softcap", **shape | {"of_plain": 0.95}))
    targets = benchmark_module("targets").evaluate_cases(cases, has_bf16=False)
    numbers = {"gflops": {"avx2": 120.0}, "level": "avx2", "read_gbs": 30.0, "cache_gbs": 60.0}
    return {
        "machine": {"cpu": "a CPU", "threads": 2, "mlx": "0.0"}, "ceilings": numbers, "cases": cases, "kv_bench": [],
        "paged": [{"label": "f16 B8", "paged_time": {"pages of 16": 1.051, "pages of 128": 1.0}}],
        "decode": [decode_row(gbs=20.0, once=False), decode_row("openvino", gbs=10.0, ms=2.0, once=False)],
        "targets": [vars(target) | {"verdict": target.verdict} for target in targets],
    }  # fmt: skip


def test_readme_tables_come_from_the_json(results, tmp_path):
    path, readme = tmp_path / "run.json", tmp_path / "README.md"
    path.write_text(json.dumps(results))
    readme.write_text("above\n<!-- benchmark -->\nold\n<!-- /benchmark -->\nbelow\n")
    done = run_script("readme_tables.py", str(path), "--into", str(readme))
    assert done.returncode == 0, done.stderr
    text = readme.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    row = "| f32 S2048 D128 causal forward | 10 | 100 | 0.82 | >= 0.82 of f32 FMA: met | PyTorch 15 | 1.50x | >= 1.20: met |"
    assert row in text.splitlines()
    assert "| softcap | 0.95 |" in text.splitlines()
    assert "| f16 B8 | 1.051 | 1.000 |" in text.splitlines()


def test_the_picture_is_drawn(benchmark_module, results, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    benchmark_module("plot").save_plot(path, results, "a CPU")
    assert path.read_bytes().startswith(b"\x89PNG")
