"""Times flash attention on real MLX arrays beside MLX's own SDPA, the composition of MLX ops, PyTorch where it is installed,
and the ceilings of this machine, measured in the same run.

  python benchmarks/benchmark_flash_attn_mlx.py --quick
  python benchmarks/benchmark_flash_attn_mlx.py --seqlen 1024 4096 --head-dim 128 --dtype bfloat16 --feature plain "softcap 30"

GFLOP/s count 4 * batch * heads * head_dim flops a visible (query, key) pair forward, and 2.5 times that backward.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import ceilings as ceiling_program
import report
from cases import DTYPE_NAMES, FEATURES, FORWARD, FORWARD_BACKWARD, PASSES, Case, grid_cases, quick_cases
from ceilings import Ceilings
from peers import Implementation, Ours, Reference, Sdpa, Torch, make_inputs
from targets import evaluate
from timing import Timing, first_run, interleave

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "bench-out"
PEERS = ("sdpa", "reference", "torch")

Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the fixed set of `make bench`; the shape options are ignored")
    shapes = parser.add_argument_group("shapes, every combination of which is a case")
    shapes.add_argument("--batch", type=int, default=1)
    shapes.add_argument("--heads", type=int, default=8)
    shapes.add_argument("--heads-k", type=int, help="kv heads, a divisor of --heads (default: --heads)")
    shapes.add_argument("--seqlen", type=int, nargs="+", default=[512, 1024, 2048])
    shapes.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    shapes.add_argument("--dtype", nargs="+", choices=tuple(DTYPE_NAMES), default=["float32"])
    shapes.add_argument("--feature", nargs="+", choices=tuple(FEATURES), default=["plain"])
    shapes.add_argument("--full", action="store_true", help="no causal mask")
    shapes.add_argument("--forward", action="store_true", help="forward only")
    shapes.add_argument("--backward", action="store_true", help="forward + backward only")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="what to time beside ours (default: torch; --quick: its own)")
    parser.add_argument("--iters", type=int, default=5, help="interleaved rounds after the first run; the fastest counts")
    parser.add_argument("--json", type=Path, default=OUTPUT / "attention.json", metavar="FILE")
    parser.add_argument("--plot", type=Path, default=OUTPUT / "attention.png", metavar="FILE")
    parser.add_argument("--check-targets", action="store_true", help="exit with 1 when a target that was measured is missed")
    args = parser.parse_args()
    heads_k = args.heads_k or args.heads
    if args.heads % heads_k:
        parser.error(f"--heads-k {heads_k} does not divide --heads {args.heads}")
    if args.iters < 1:
        parser.error("--iters must be at least 1")
    return args


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    if args.quick:
        return quick_cases()
    passes = [FORWARD] * args.forward + [FORWARD_BACKWARD] * args.backward or list(PASSES)
    peers = ("torch",) if args.peers is None else tuple(args.peers)
    return grid_cases(
        args.batch, args.heads, args.heads_k or args.heads, args.seqlen, args.head_dim, args.dtype, args.feature, passes,
        not args.full, peers,
    )  # fmt: skip


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


def main() -> int:
    args = parse_arguments()
    from flash_attn.flash_attn_mlx.utils import load_core

    core = load_core()
    console = report.make_console()
    mx.set_default_device(mx.cpu)
    threads = core.num_threads()
    ceilings = Ceilings(ceiling_program.build(), threads, core.isa_level())
    ceilings.measure(read=True)
    machine = describe_machine(threads)
    subtitle = f"{machine['cpu']}, {threads} threads, {ceilings.level} kernels, MLX {machine['mlx']}"
    console.print(subtitle)
    report.print_ceilings(console, ceilings)

    cases = chosen_cases(args)
    if args.quick and args.peers is not None:
        cases = [case.restricted_to(args.peers) for case in cases]
    implementations: dict[str, Implementation] = {peer.name: peer for peer in (Ours(), Sdpa(), Reference(), Torch(threads))}
    warm_up(implementations)
    rows: list[Row] = []
    gaps: dict[str, dict[str, None]] = {peer: {} for peer in PEERS}
    memory = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("starting", total=len(cases) + args.quick)
        for case in cases:
            progress.update(task, description=f"{case.label} {case.steps}")
            found, missing = run_case(case, implementations, args.iters)
            for peer, reason in missing.items():
                gaps[peer][reason] = None
            rows += found
            ceilings.measure()
            console.print(report.case_line(case.label, case.steps, found), soft_wrap=True)
            progress.advance(task)
        if args.quick:
            progress.update(task, description="peak memory at S32768")
            memory = measure_memory()
            progress.advance(task)

    for row in rows:
        row["of_ceiling"] = row["gflops"] / ceilings.fma_gflops
    console.print()
    report.print_cases(console, [row for row in rows if row["section"] != "features"])
    report.print_features(console, rows)
    if memory:
        report.print_memory(console, memory)
    report.print_gaps(console, gaps)
    ceilings.measure(read=True)
    report.print_ceilings(console, ceilings)
    targets = evaluate(rows, memory)
    if args.quick or args.check_targets:
        report.print_targets(console, targets)

    from plot import save_plot

    args.json.parent.mkdir(parents=True, exist_ok=True)
    ceiling_numbers = {"gflops": ceilings.gflops, "read_gbs": ceilings.read_gbs, "level": ceilings.level}
    args.json.write_text(
        json.dumps({"machine": machine, "ceilings": ceiling_numbers, "cases": rows, "memory": memory}, indent=1)
    )
    save_plot(args.plot, rows, ceilings.fma_gflops, subtitle)
    console.print(f"wrote {args.json} and {args.plot}", soft_wrap=True)
    return int(args.check_targets and any(target.verdict == "missed" for target in targets))


if __name__ == "__main__":
    sys.exit(main())
