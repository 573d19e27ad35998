"""Tables for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from case import DTYPE_NAMES, FORWARD, PASSES
from ceilings import Ceilings
from kv_bench import COLUMNS, summary
from peers import TITLES
from targets import Target

Row = dict[str, Any]


def make_console() -> Console:
    """Plain wide lines in a pipe; colour and the terminal's own width on a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=132)


def _table(console: Console, title: str, columns: Sequence[str], text_columns: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD if console.is_terminal else None)
    table.pad_edge = False
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text_columns else "right", overflow="fold")
    return table


def milliseconds(row: Row) -> str:
    """With a star where the call was run once only."""
    return (f"{row['ms']:.1f}" if row["ms"] >= 10 else f"{row['ms']:.2f}") + ("*" if row["once"] else "")


def gflops(row: Row) -> str:
    return f"{row['gflops']:.0f}" if row["gflops"] >= 10 else f"{row['gflops']:.1f}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def case_line(case_label: str, steps: str, rows: list[Row]) -> str:
    """One finished case, for the running log."""
    ours = next(row for row in rows if row["implementation"] == "ours")
    parts = [f"{case_label:43} {steps:17} {ours['ms']:8.1f} ms {gflops(ours):>5} GFLOP/s"]
    if ours["of_plain"]:
        parts.append(f"{ours['of_plain']:.2f} of {'plain' if ours['feature'] != 'plain' else 'float32'}")
    for row in rows:
        if row is not ours:
            parts.append(f"{TITLES[row['implementation']]} {milliseconds(row)} ms")
    return "  ".join(parts)


def print_ceilings(console: Console, ceilings: Ceilings) -> None:
    levels = ", ".join(f"{level} {value:.0f}" for level, value in ceilings.gflops.items())
    console.print(
        f"ceilings, {ceilings.threads} threads: multiply-add GFLOP/s {levels} (_bf16: dot products, _amx: matrix tiles); "
        f"{_memory_read(ceilings)}; cache read {ceilings.cache_gbs:.1f} GB/s over {ceilings.cache_bytes / 2**20:.0f} MiB",
        soft_wrap=True,
    )


def _memory_read(ceilings: Ceilings) -> str:
    return f"memory read {ceilings.read_gbs:.1f} GB/s over {ceilings.read_bytes / 2**20:.0f} MiB"


def print_cases(console: Console, rows: list[Row]) -> None:
    if not rows:
        return
    columns = ("case", "pass", "by", "ms", "GFLOP/s", "%", "of", "ours faster", "MLX MiB", "process MiB")
    table = _table(console, "Ours and its peers", columns, text_columns=3)
    ours_ms = 0.0
    for row in rows:
        ours = row["implementation"] == "ours"
        if ours:
            ours_ms = row["ms"]
        table.add_row(
            row["label"] if ours else "",
            row["steps"] if ours else "",
            TITLES[row["implementation"]],
            milliseconds(row),
            gflops(row),
            f"{100 * row['of_ceiling']:.0f}",
            row["ceiling"] if ours else "",
            "" if ours else f"{row['ms'] / ours_ms:.1f}x",
            _mib(row["mlx_peak_mib"]),
            _mib(row["process_peak_mib"]),
            style="bold" if ours else "",
        )
    console.print(table)
    console.print("peaks are above what the inputs hold; * a peer slower than a second, run once")


def print_features(console: Console, rows: list[Row]) -> None:
    ours = [row for row in rows if row["implementation"] == "ours" and row["feature"] != "plain"]
    shapes = sorted({(row["dtype"], row["seqlen"], row["head_dim"], row["steps"]) for row in ours}, key=_shape_order)
    if not ours:
        return
    columns = [
        f"{DTYPE_NAMES[dtype]} S{seqlen} D{dim} {steps.replace('forward', 'fwd').replace('backward', 'bwd')}"
        for dtype, seqlen, dim, steps in shapes
    ]
    title = "Speed per visible pair, of plain's"
    table = _table(console, title, ("feature", *columns))
    for feature in dict.fromkeys(row["feature"] for row in ours):
        values = {
            (row["dtype"], row["seqlen"], row["head_dim"], row["steps"]): row["of_plain"]
            for row in ours
            if row["feature"] == feature
        }
        table.add_row(feature, *(f"{values[shape]:.2f}" if shape in values else "" for shape in shapes))
    console.print(table)


def _shape_order(shape: tuple[str, int, int, str]) -> tuple[bool, int, int, int]:
    dtype, seqlen, head_dim, steps = shape
    return (dtype != "float32", seqlen, head_dim, PASSES.index(steps) if steps in PASSES else PASSES.index(FORWARD))


def decode_line(rows: list[Row]) -> str:
    """One finished decode case, for the running log."""
    ours, *others = rows
    parts = [f"{ours['label']:43} {'decode':17} {ours['ms']:8.3f} ms {ours['gbs']:5.1f} GB/s"]
    parts += [f"{TITLES[row['implementation']]} {row['ms']:.3f} ms" for row in others]
    return "  ".join(parts)


def print_decode(console: Console, rows: list[Row]) -> None:
    columns = ("case", "by", "ms", "GB/s", "read GB/s", "% of read", "% of FMA", "ours faster")
    table = _table(console, "Decode, one query a sequence", columns, text_columns=2)
    ours = rows[0]
    for row in rows:
        if row["implementation"] == "ours":
            ours = row
        table.add_row(
            row["label"] if row is ours else "",
            TITLES[row["implementation"]],
            f"{row['ms']:.3f}" + ("*" if row["once"] else ""),
            f"{row['gbs']:.1f}",
            f"{row['read_gbs']:.1f}" if row is ours else "",
            f"{100 * row['of_read']:.0f}",
            f"{100 * row['of_fma']:.0f}",
            "" if row is ours else f"{row['ms'] / ours['ms']:.1f}x",
            style="bold" if row is ours else "",
        )
    console.print(table)
    console.print(
        "GB/s: K and V (their scales and biases too) read once, at the fastest. read: a loop that only reads as many bytes, in "
        "turns with the others; its GB/s and shares of it are medians of rounds. Each call reads another cache; all of them "
        "together are as large as what that loop walks through; in cache: the same one, calls in a row. * a peer slower than a "
        "second, run once",
        soft_wrap=True,
    )


def paged_line(row: Row) -> str:
    ratios = "; ".join(f"{pages} {ratio:.3f}" for pages, ratio in row["paged_time"].items())
    return f"{row['label']:43} time over the contiguous cache's, median of interleaved pairs: {ratios}"


def print_append(console: Console, append_us: dict[str, float]) -> None:
    appends = ", ".join(f"{us:.0f} us at capacity {capacity}" for capacity, us in append_us.items())
    console.print(f"a step that appends one token: {appends}")


def threads_line(row: Row) -> str:
    return f"{row['label']:43} {row['steps']:17} 1 thread {row['one_ms']:.2f} ms, 2 threads {row['two_ms']:.2f} ms"


def busy_line(row: Row) -> str:
    return f"{row['label']:43} beside a busy core, medians: 1 thread {row['one_us']:.1f} us, 2 threads {row['two_us']:.1f} us"


def print_kv_bench(console: Console, rows: list[Row]) -> None:
    """One line a config, cells between bars, to be read by people and by programs."""
    for dtype, seqlen_q in dict.fromkeys((row["dtype"], row["seqlen_q"]) for row in rows):
        queries = "1 query" if seqlen_q == 1 else f"{seqlen_q} queries"
        console.print(f"\nContiguous and paged KV cache, {dtype}, {queries} a sequence", style="bold")
        console.print(" | ".join(COLUMNS), soft_wrap=True)
        for row in rows:
            if (row["dtype"], row["seqlen_q"]) == (dtype, seqlen_q):
                console.print(summary(row), soft_wrap=True)


def print_gaps(console: Console, gaps: dict[str, dict[str, None]], left_out: list[str]) -> None:
    for peer, reasons in gaps.items():
        if reasons:
            console.print(f"not measured, {TITLES[peer]}: {'; '.join(reasons)}", soft_wrap=True)
    for line in left_out:
        console.print(f"left out: {line}", soft_wrap=True)


def print_memory(console: Console, memory: Row) -> None:
    process = "" if memory["process_copies"] is None else f", process {memory['process_copies']:.1f}"
    console.print(
        f"memory: {memory['label']}: {memory['seconds']:.1f} s, {memory['gflops']:.0f} GFLOP/s; peak in copies of q "
        f"({memory['q_mib']:.0f} MiB): MLX {memory['mlx_copies']:.1f}{process}"
    )


def print_targets(console: Console, targets: list[Target]) -> None:
    table = _table(console, "Targets", ("what", "in", "need", "got", ""), text_columns=2)
    colours = {"met": "green", "missed": "red", "not measured": "dim"}
    shown = ""
    for target in targets:
        style = "" if not console.is_terminal else colours[target.verdict]
        table.add_row(
            "" if target.what == shown else target.what,
            target.against,
            _need(target),
            _got(target),
            target.verdict,
            style=style,
        )
        shown = target.what
    console.print(table)
    counts = [f"{verdict} {sum(t.verdict == verdict for t in targets)}" for verdict in colours]
    console.print(f"of {len(targets)} targets: {', '.join(counts)}", style="bold")


def _need(target: Target) -> str:
    return f"{'<=' if target.at_most else '>='} {_number(target.need)}"


def _got(target: Target) -> str:
    return "-" if target.got is None else _number(target.got)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}"
