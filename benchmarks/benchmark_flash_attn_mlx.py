"""Times flash attention on real MLX arrays beside MLX's own SDPA, the composition of MLX ops, what is installed of PyTorch,
ONNX Runtime and OpenVINO, and the ceilings of this machine, measured in the same run.

  python benchmarks/benchmark_flash_attn_mlx.py --quick
  python benchmarks/benchmark_flash_attn_mlx.py --sections features pairs
  python benchmarks/benchmark_flash_attn_mlx.py --sections all --json results.json
  python benchmarks/benchmark_flash_attn_mlx.py --seqlen 1024 4096 --head-dim 128 --dtype bfloat16 --feature plain softcap
  python benchmarks/benchmark_flash_attn_mlx.py --kv-bench --kv-live-lengths 512 4096 --kv-page-sizes 16

GFLOP/s count 4 * batch * heads * head_dim flops a visible (query, key) pair forward, and 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

import ceilings as ceiling_program
import report
from attention import warm_up
from case import DTYPE_NAMES, FEATURES, FORWARD, FORWARD_BACKWARD, PASSES, Case, KvConfig
from cases import OTHER_SECTIONS, SECTIONS, grid_cases, section_cases
from ceilings import Ceilings
from kv_bench import kv_configs, run_kv_config
from peers import PEERS, make_peers
from sweep import Sweep
from targets import Target

OUTPUT = Path(__file__).resolve().parent.parent / "bench-out"
FAST_PEERS = ("torch", "onnxruntime", "openvino")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_argument_group("tables of cases; the shape options are ignored")
    tables.add_argument("--quick", action="store_true", help="the part of them that `make bench` has minutes for")
    tables.add_argument("--sections", nargs="+", choices=("all", *SECTIONS), help="these, whole; with --quick its part of them")
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
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, help="what to time beside ours (default: all; of shapes: the fast ones)"
    )
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


def chosen_sections(args: argparse.Namespace) -> list[str]:
    """Empty for a grid of shapes."""
    if args.sections:
        return [name for name in SECTIONS if name in args.sections or "all" in args.sections]
    return list(SECTIONS) if args.quick else []


def chosen_grid(args: argparse.Namespace) -> list[Case]:
    passes = [FORWARD] * args.forward + [FORWARD_BACKWARD] * args.backward or list(PASSES)
    return grid_cases(
        args.batch, args.heads, args.heads_k or args.heads, args.seqlen, args.head_dim or [64, 128], args.dtype or ["float32"],
        args.feature, passes, not args.full,
    )  # fmt: skip


def chosen_kv_configs(args: argparse.Namespace) -> list[KvConfig]:
    lengths = (args.kv_batch_sizes, args.kv_live_lengths, args.kv_max_cache_lengths, args.kv_page_sizes)
    if not args.kv_bench:
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


def left_out(sections: list[str], cases: list[Case], args: argparse.Namespace) -> list[str]:
    """What a table has and this run has not, a line each."""
    lines = []
    if cases:
        names = list(dict.fromkeys(case.section for case in cases))
        labels = "; ".join(f"{case.label} {case.steps}" for case in cases)
        lines.append(f"by --quick ({len(cases)} cases; --sections {' '.join(names)} has them): {labels}")
    if args.quick:
        lines.append("by --quick, MLX SDPA and the composition where a call takes seconds, except at the headline shape")
    if sections and len(sections) < len(SECTIONS):
        lines.append(f"sections {' '.join(name for name in SECTIONS if name not in sections)}")
    if sections:
        lines.append("instructions of paged attention over contiguous: a matter of callgrind, not of a clock")
    return lines


def run_sweep(args: argparse.Namespace, console: Console, core: Any) -> int:
    started = time.monotonic()
    threads = core.num_threads()
    ceilings = Ceilings(ceiling_program.build(), threads, core.isa_level())
    ceilings.measure(read=True)
    machine = describe_machine(threads)
    subtitle = f"{machine['cpu']}, {threads} threads, {ceilings.level} kernels, MLX {machine['mlx']}"
    console.print(subtitle)
    report.print_ceilings(console, ceilings)

    sections = chosen_sections(args)
    cases, omitted = section_cases(sections, args.quick) if sections else (chosen_grid(args), [])
    chosen = (PEERS if sections else FAST_PEERS) if args.peers is None else tuple(args.peers)
    peers = make_peers(threads)
    warm_up([peers["ours"], *(peers[name] for name in chosen)])
    gc.freeze()  # the libraries' objects, so that a collection before each measurement takes no time
    sweep = Sweep(console, ceilings, peers, chosen, args.quick, args.iters)
    sweep.run(cases, [name for name in OTHER_SECTIONS if name in sections], chosen_kv_configs(args), args.kv_bench_iters)
    ceilings.measure(read=True)
    targets = sweep.finish()

    results = sweep.results
    console.print()
    report.print_cases(console, [row for row in results.cases if row["section"] not in ("features", "pairs")])
    report.print_features(console, results.cases)
    if results.decode:
        report.print_decode(console, results.decode)
    for line in [report.paged_line(row) for row in results.paged]:
        console.print(line, soft_wrap=True)
    if results.append_us:
        report.print_append(console, results.append_us)
    if results.memory:
        report.print_memory(console, results.memory)
    if results.kv_bench:
        report.print_kv_bench(console, results.kv_bench)
    lines = left_out(sections, omitted, args)
    report.print_gaps(console, results.gaps, lines)
    report.print_ceilings(console, ceilings)
    if sections or args.check_targets:
        report.print_targets(console, targets)
    write_results(args, console, machine, ceilings, sweep, targets, lines, subtitle)
    console.print(f"took {time.monotonic() - started:.0f} s")
    return int(args.check_targets and any(target.verdict == "missed" for target in targets))


def write_results(
    args: argparse.Namespace, console: Console, machine: dict[str, Any], ceilings: Ceilings, sweep: Sweep,
    targets: list[Target], lines: list[str], subtitle: str,
) -> None:  # fmt: skip
    from plot import save_plot

    path = args.json or OUTPUT / "attention.json"
    verdicts = [asdict(target) | {"verdict": target.verdict} for target in targets]
    whole = {
        "machine": machine,
        "ceilings": ceilings.numbers(),
        **asdict(sweep.results),
        "targets": verdicts,
        "left_out": lines,
    }
    write_json(path, whole)
    drawn = f" and {args.plot}" if save_plot(args.plot, whole, subtitle) else ""
    console.print(f"wrote {path}{drawn}", soft_wrap=True)


def main() -> int:
    args = parse_arguments()
    from flash_attn.flash_attn_mlx.utils import load_core

    mx.set_default_device(mx.cpu)
    run = run_kv_bench if args.kv_bench and not (args.quick or args.sections) else run_sweep
    return run(args, report.make_console(), load_core())


if __name__ == "__main__":
    sys.exit(main())
