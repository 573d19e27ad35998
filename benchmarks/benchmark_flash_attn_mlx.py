"""Times flash attention on real MLX arrays beside MLX's own SDPA, the composition of MLX ops, PyTorch where it is installed,
and the ceilings of this machine, measured in the same run.

  python benchmarks/benchmark_flash_attn_mlx.py --quick
  python benchmarks/benchmark_flash_attn_mlx.py --seqlen 1024 4096 --head-dim 128 --dtype bfloat16 --feature plain "softcap 30"
  python benchmarks/benchmark_flash_attn_mlx.py --kv-bench --kv-live-lengths 512 4096 --kv-page-sizes 16

GFLOP/s count 4 * batch * heads * head_dim flops a visible (query, key) pair forward, and 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import ceilings as ceiling_program
import decode
import decode_peers
import report
from cases import (
    DECODE_DTYPES,
    DECODE_SHAPES,
    DTYPE_NAMES,
    FEATURES,
    FORWARD,
    FORWARD_BACKWARD,
    PASSES,
    Case,
    KvConfig,
    grid_cases,
    quick_cases,
)
from ceilings import Ceilings
from kv_bench import kv_configs, run_kv_config
from onnxruntime_peer import OnnxRuntime
from openvino_peer import OpenVino
from peers import Implementation, Ours, Reference, Sdpa, Torch, make_inputs
from targets import evaluate, evaluate_decode
from timing import Timing, first_run, interleave

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "bench-out"
PEERS = ("sdpa", "reference", "torch", "onnxruntime", "openvino")

Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the fixed set of `make bench`; the shape options are ignored")
    shapes = parser.add_argument_group("shapes, every combination of which is a case")
    shapes.add_argument("--batch", type=int, default=1)
    shapes.add_argument("--heads", type=int, default=8)
    shapes.add_argument("--heads-k", type=int, help="kv heads, a divisor of --heads (default: --heads)")
    shapes.add_argument("--seqlen", type=int, nargs="+", default=[512, 1024, 2048])
    shapes.add_argument("--head-dim", type=int, nargs="+", help="(default: 64 128; --kv-bench: 128)")
    shapes.add_argument("--dtype", nargs="+", choices=tuple(DTYPE_NAMES), help="(default: float32; --kv-bench: float16)")
    shapes.add_argument("--feature", nargs="+", choices=tuple(FEATURES), default=["plain"])
    shapes.add_argument("--full", action="store_true", help="no causal mask")
    shapes.add_argument("--forward", action="store_true", help="forward only")
    shapes.add_argument("--backward", action="store_true", help="forward + backward only")
    kv = parser.add_argument_group("contiguous and paged KV caches, every combination of which is a case")
    kv.add_argument("--kv-bench", action="store_true", help="only these, of --heads, --head-dim and --dtype; a part of --quick")
    kv.add_argument("--kv-batch-sizes", type=int, nargs="+", default=[1, 8], metavar="B")
    kv.add_argument("--kv-live-lengths", type=int, nargs="+", default=[512, 2048], metavar="L", help="tokens of each sequence")
    kv.add_argument(
        "--kv-max-cache-lengths", type=int, nargs="+", default=[4096], metavar="M", help="slots of a contiguous row"
    )
    kv.add_argument("--kv-page-sizes", type=int, nargs="+", default=[16, 128], metavar="P")
    kv.add_argument("--kv-seqlen-q", type=int, default=1, metavar="N", help="queries of each sequence, its last tokens")
    kv.add_argument("--kv-bench-iters", type=int, default=20, metavar="N", help="as --iters")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="what to time beside ours (default: torch; --quick: its own)")
    parser.add_argument("--iters", type=int, default=5, help="interleaved rounds after the first run; the fastest counts")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="(default: bench-out/attention.json, --kv-bench: kv_cache.json)"
    )
    parser.add_argument("--plot", type=Path, default=OUTPUT / "attention.png", metavar="FILE")
    parser.add_argument("--check-targets", action="store_true", help="exit with 1 when a target that was measured is missed")
    args = parser.parse_args()
    heads_k = args.heads_k or args.heads
    if args.heads % heads_k:
        parser.error(f"--heads-k {heads_k} does not divide --heads {args.heads}")
    for option in ("iters", "kv_seqlen_q", "kv_bench_iters"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1")
    if min(args.kv_batch_sizes + args.kv_live_lengths + args.kv_page_sizes) < 1:
        parser.error("--kv-batch-sizes, --kv-live-lengths and --kv-page-sizes must be at least 1")
    if min(args.kv_live_lengths) > max(args.kv_max_cache_lengths):
        parser.error("no --kv-live-lengths fits any of --kv-max-cache-lengths")
    return args


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    if args.quick:
        return quick_cases()
    passes = [FORWARD] * args.forward + [FORWARD_BACKWARD] * args.backward or list(PASSES)
    peers = ("torch",) if args.peers is None else tuple(args.peers)
    return grid_cases(
        args.batch, args.heads, args.heads_k or args.heads, args.seqlen, args.head_dim or [64, 128], args.dtype or ["float32"],
        args.feature, passes, not args.full, peers,
    )  # fmt: skip


def chosen_kv_configs(args: argparse.Namespace) -> list[KvConfig]:
    lengths = (args.kv_batch_sizes, args.kv_live_lengths, args.kv_max_cache_lengths, args.kv_page_sizes)
    if args.quick:
        return kv_configs(*lengths, seqlen_q=args.kv_seqlen_q)
    return [
        config
        for dtype in args.dtype or ["float16"]
        for head_dim in args.head_dim or [128]
        for config in kv_configs(
            *lengths,
            seqlen_q=args.kv_seqlen_q,
            heads=args.heads,
            heads_k=args.heads_k or args.heads,
            head_dim=head_dim,
            dtype=dtype,
        )
    ]


def describe_machine(threads: int) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {"cpu": cpu, "threads": threads, "mlx": version("mlx"), "python": platform.python_version()}


def row_of(case: Case, implementation: str, timing: Timing, plain: Timing | None) -> Row:
    row: Row = {
        "section": case.section, "feature": case.feature, "label": case.label, "steps": case.steps, "dtype": case.dtype,
        "batch": case.batch, "heads": case.heads, "heads_k": case.heads_k, "seqlen": case.seqlen, "head_dim": case.head_dim,
        "causal": case.causal, "implementation": implementation, "ms": timing.seconds * 1e3, "runs": timing.runs,
        "once": timing.runs == 1, "gflops": case.flops() / timing.seconds * 1e-9, "of_plain": None,
        "mlx_peak_mib": timing.peak.mlx_bytes / 2**20,
        "process_peak_mib": None if timing.peak.process_bytes is None else timing.peak.process_bytes / 2**20,
    }  # fmt: skip
    if plain is not None:
        row["of_plain"] = (plain.seconds / case.plain.visible_pairs()) / (timing.seconds / case.visible_pairs())
    return row


def warm_up(implementations: dict[str, Implementation]) -> None:
    """A first call loads libraries and starts threads; a peer that runs once must not pay for that."""
    tiny = Case("shapes", heads=1, heads_k=1, seqlen=8, head_dim=8, steps=FORWARD_BACKWARD)
    inputs = make_inputs(tiny)
    for implementation in implementations.values():
        if not implementation.missing(tiny):
            implementation.prepare(tiny, inputs)()


def run_case(case: Case, implementations: dict[str, Implementation], iters: int) -> tuple[list[Row], dict[str, str]]:
    """Rows of one case, ours first, and by peer why it has none."""
    inputs = make_inputs(case)
    ours = implementations["ours"]
    calls = {"ours": ours.prepare(case, inputs)}
    if case.compare_with_plain:
        calls["plain"] = ours.prepare(case.plain, make_inputs(case.plain))
    timings = {name: first_run(call) for name, call in calls.items()}
    missing = {}
    for name in case.peers:
        reason = implementations[name].missing(case)
        if not reason:
            try:
                call = implementations[name].prepare(case, inputs)
                timings[name] = first_run(call)
                calls[name] = call
            except (RuntimeError, ValueError) as error:  # a peer's limits are not ours to know; its message says them
                reason = f"{case.label} {case.steps}: {error}"
        if reason:
            missing[name] = reason
    interleave(calls, timings, once_if_slow=case.peers, iters=iters)
    plain = timings.pop("plain", None)
    rows = [row_of(case, name, timing, plain if name == "ours" else None) for name, timing in timings.items()]
    return rows, missing


def measure_memory() -> Row:
    command = [sys.executable, str(HERE / "peak_memory.py")]
    measured: Row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return measured


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))


def run_kv_bench(args: argparse.Namespace, console: Console, core: Any) -> int:
    rows = [run_kv_config(config, args.kv_bench_iters) for config in chosen_kv_configs(args)]
    report.print_kv_bench(console, rows)
    path = args.json or OUTPUT / "kv_cache.json"
    write_json(path, {"machine": describe_machine(core.num_threads()), "kv_bench": rows})
    console.print(f"wrote {path}", soft_wrap=True)
    return 0


@dataclass
class Results:
    cases: list[Row] = field(default_factory=list)
    gaps: dict[str, dict[str, None]] = field(default_factory=lambda: {peer: {} for peer in PEERS})
    # Of --quick only:
    memory: Row | None = None
    decode: list[Row] = field(default_factory=list)
    append_us: dict[str, float] = field(default_factory=dict)
    kv_bench: list[Row] = field(default_factory=list)

    def note_gaps(self, missing: dict[str, str]) -> None:
        for peer, reason in missing.items():
            self.gaps[peer][reason] = None


def measure_all(args: argparse.Namespace, console: Console, ceilings: Ceilings) -> Results:
    cases = chosen_cases(args)
    if args.quick and args.peers is not None:
        cases = [case.restricted_to(args.peers) for case in cases]
    implementations: dict[str, Implementation] = {
        peer.name: peer
        for peer in (
            Ours(),
            Sdpa(),
            Reference(),
            Torch(ceilings.threads),
            OnnxRuntime(ceilings.threads),
            OpenVino(ceilings.threads),
        )
    }
    warm_up(implementations)
    results = Results()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        others = 3 + len(DECODE_DTYPES) * len(DECODE_SHAPES) if args.quick else 0
        task = progress.add_task("starting", total=len(cases) + others)
        for case in cases:
            progress.update(task, description=f"{case.label} {case.steps}")
            found, missing = run_case(case, implementations, args.iters)
            results.note_gaps(missing)
            results.cases += found
            ceilings.measure()
            console.print(report.case_line(case.label, case.steps, found), soft_wrap=True)
            progress.advance(task)
        if not args.quick:
            return results

        progress.update(task, description="peak memory at S32768")
        results.memory = measure_memory()
        progress.advance(task)
        progress.update(task, description="decode")
        peers = tuple(peer for peer in decode_peers.PEERS if args.peers is None or peer in args.peers)
        for found, missing in decode.run_decode(ceilings.read_bytes, peers, ceilings.threads):
            results.note_gaps(missing)
            results.decode += found
            console.print(report.decode_line(found), soft_wrap=True)
            progress.advance(task)
        ceilings.measure(read=True)
        progress.update(task, description="append")
        results.append_us = decode.measure_append()
        progress.advance(task)
        progress.update(task, description="contiguous and paged KV caches")
        results.kv_bench = [run_kv_config(config, args.kv_bench_iters) for config in chosen_kv_configs(args)]
        progress.advance(task)
    return results


def run_sweep(args: argparse.Namespace, console: Console, core: Any) -> int:
    threads = core.num_threads()
    ceilings = Ceilings(ceiling_program.build(), threads, core.isa_level())
    ceilings.measure(read=True)
    machine = describe_machine(threads)
    subtitle = f"{machine['cpu']}, {threads} threads, {ceilings.level} kernels, MLX {machine['mlx']}"
    console.print(subtitle)
    report.print_ceilings(console, ceilings)

    results = measure_all(args, console, ceilings)
    ceilings.measure(read=True)
    rows = results.cases
    for row in rows:
        row["of_ceiling"] = row["gflops"] / ceilings.fma_gflops
    for row in results.decode:
        row["of_read"] = row["gbs"] / ceilings.read_gbs

    console.print()
    report.print_cases(console, [row for row in rows if row["section"] != "features"])
    report.print_features(console, rows)
    if results.memory:
        report.print_memory(console, results.memory)
        report.print_decode(console, results.decode, results.append_us, ceilings)
        report.print_kv_bench(console, results.kv_bench)
    report.print_gaps(console, results.gaps)
    report.print_ceilings(console, ceilings)
    targets = evaluate(rows, results.memory) + evaluate_decode(results.decode, results.append_us)
    if args.quick or args.check_targets:
        report.print_targets(console, targets)

    from plot import save_plot

    path = args.json or OUTPUT / "attention.json"
    ceiling_numbers = {
        "gflops": ceilings.gflops, "read_gbs": ceilings.read_gbs, "read_bytes": ceilings.read_bytes, "level": ceilings.level,
    }  # fmt: skip
    write_json(
        path,
        {
            "machine": machine, "ceilings": ceiling_numbers, "cases": rows, "memory": results.memory,
            "decode": results.decode, "append_us": results.append_us, "kv_bench": results.kv_bench,
        },
    )  # fmt: skip
    save_plot(args.plot, rows, ceilings.fma_gflops, results.decode, ceilings.read_gbs, subtitle)
    console.print(f"wrote {path} and {args.plot}", soft_wrap=True)
    return int(args.check_targets and any(target.verdict == "missed" for target in targets))


def main() -> int:
    args = parse_arguments()
    from flash_attn.flash_attn_mlx.utils import load_core

    mx.set_default_device(mx.cpu)
    run = run_kv_bench if args.kv_bench and not args.quick else run_sweep
    return run(args, report.make_console(), load_core())


if __name__ == "__main__":
    sys.exit(main())
