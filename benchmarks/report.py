"""Tables for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cases import DTYPE_NAMES, FORWARD, PASSES
from ceilings import Ceilings
from kv_bench import COLUMNS, summary
from targets import Target

Row = dict[str, Any]

IMPLEMENTATION_NAMES = {
    "ours": "ours", "sdpa": "MLX SDPA", "reference": "composed", "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO",
}  # fmt: skip


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
    return f"{row['ms']:.1f}" + ("*" if row["once"] else "")


def gflops(row: Row) -> str:
    return f"{row['gflops']:.0f}" if row["gflops"] >= 10 else f"{row['gflops']:.1f}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def case_line(case_label: str, steps: str, rows: list[Row]) -> str:
    """One finished case, for the running log."""
    ours = next(row for row in rows if row["implementation"] == "ours")
    parts = [f"{case_label:43} {steps:17} {ours['ms']:8.1f} ms {gflops(ours):>5} GFLOP/s"]
    if ours["of_plain"]:
        parts.append(f"{ours['of_plain']:.2f} of plain")
    for row in rows:
        if row is not ours:
            parts.append(f"{IMPLEMENTATION_NAMES[row['implementation']]} {milliseconds(row)} ms")
    return "  ".join(parts)


def print_ceilings(console: Console, ceilings: Ceilings) -> None:
    levels = ", ".join(f"{level} {value:.0f}" for level, value in ceilings.gflops.items())
    console.print(f"ceilings: multiply-add GFLOP/s {levels}; {_memory_read(ceilings)}")


def _memory_read(ceilings: Ceilings) -> str:
    return f"memory read {ceilings.read_gbs:.1f} GB/s, {ceilings.threads} threads over {ceilings.read_bytes / 2**20:.0f} MiB"


def print_cases(console: Console, rows: list[Row]) -> None:
    columns = ("case", "pass", "by", "ms", "GFLOP/s", "% ceiling", "ours faster", "MLX MiB", "process MiB")
    table = _table(console, "Ours and its peers", columns, text_columns=3)
    ours_ms = 0.0
    for row in rows:
        ours = row["implementation"] == "ours"
        if ours:
            ours_ms = row["ms"]
        table.add_row(
            row["label"] if ours else "",
            row["steps"] if ours else "",
            IMPLEMENTATION_NAMES[row["implementation"]],
            milliseconds(row),
            gflops(row),
            f"{100 * row['of_ceiling']:.0f}",
            "" if ours else f"{row['ms'] / ours_ms:.1f}x",
            _mib(row["mlx_peak_mib"]),
            _mib(row["process_peak_mib"]),
            style="bold" if ours else "",
        )
    console.print(table)
    console.print("peaks are above what the inputs hold; * a peer slower than a second, run once")


def print_features(console: Console, rows: list[Row]) -> None:
    ours = [row for row in rows if row["implementation"] == "ours" and row["of_plain"]]
    shapes = sorted({(row["dtype"], row["seqlen"], row["head_dim"], row["steps"]) for row in ours}, key=_shape_order)
    if not ours:
        return
    columns = [
        f"{DTYPE_NAMES[dtype]} S{seqlen} D{dim} {steps.replace('forward', 'fwd').replace('backward', 'bwd')}"
        for dtype, seqlen, dim, steps in shapes
    ]
    title = "Speed per visible (query, key) pair, of plain's (1.00: the feature is free; of 16-bit plain: of float32's)"
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
    parts = [f"{ours['label']:43} {'decode':17} {ours['ms']:8.2f} ms {ours['gbs']:5.1f} GB/s"]
    parts += [f"page {size}: {time:.2f}" for size, time in ours["paged_time"].items()]
    parts += [f"{IMPLEMENTATION_NAMES[row['implementation']]} {row['ms']:.2f} ms" for row in others]
    return "  ".join(parts)


def print_decode(console: Console, rows: list[Row], append_us: dict[str, float], ceilings: Ceilings) -> None:
    page_sizes = list(rows[0]["paged_time"])
    columns = ("case", "by", "ms", "GB/s", "% of read", "ours faster", *(f"page {size}" for size in page_sizes))
    table = _table(console, f"Decode, one query a sequence; 100 % of read: {_memory_read(ceilings)}", columns, text_columns=2)
    ours = rows[0]
    for row in rows:
        if row["implementation"] == "ours":
            ours = row
        table.add_row(
            row["label"] if row is ours else "",
            IMPLEMENTATION_NAMES[row["implementation"]],
            f"{row['ms']:.2f}" + ("*" if row["once"] else ""),
            f"{row['gbs']:.1f}",
            f"{100 * row['of_read']:.0f}",
            "" if row is ours else f"{row['ms'] / ours['ms']:.1f}x",
            *(f"{time:.2f}" for time in (row["paged_time"] or {}).values()),
            style="bold" if row is ours else "",
        )
    console.print(table)
    console.print(
        "GB/s: K and V (int8: and their scales) read once. Each call reads another cache; all of them together are as large as "
        "what the ceiling reads. page n: time with pages of n tokens over the contiguous cache's, median of interleaved pairs; "
        "* a peer slower than a second, run once",
        soft_wrap=True,
    )
    appends = ", ".join(f"{us:.0f} us at capacity {capacity}" for capacity, us in append_us.items())
    console.print(f"a step that appends one token: {appends}")


def print_kv_bench(console: Console, rows: list[Row]) -> None:
    """One line a config, cells between bars, to be read by people and by programs."""
    for dtype, seqlen_q in dict.fromkeys((row["dtype"], row["seqlen_q"]) for row in rows):
        queries = "1 query" if seqlen_q == 1 else f"{seqlen_q} queries"
        console.print(f"\nContiguous and paged KV cache, {dtype}, {queries} a sequence", style="bold")
        console.print(" | ".join(COLUMNS), soft_wrap=True)
        for row in rows:
            if (row["dtype"], row["seqlen_q"]) == (dtype, seqlen_q):
                console.print(summary(row), soft_wrap=True)


def print_gaps(console: Console, gaps: dict[str, dict[str, None]]) -> None:
    for peer, reasons in gaps.items():
        if reasons:
            console.print(f"not measured, {IMPLEMENTATION_NAMES[peer]}: {'; '.join(reasons)}", soft_wrap=True)


def print_memory(console: Console, memory: Row) -> None:
    process = "" if memory["process_copies"] is None else f", process {memory['process_copies']:.1f}"
    console.print(
        f"memory: {memory['label']}: {memory['seconds']:.1f} s, {memory['gflops']:.0f} GFLOP/s; peak in copies of q "
        f"({memory['q_mib']:.0f} MiB): MLX {memory['mlx_copies']:.1f}{process}"
    )


def print_targets(console: Console, targets: list[Target]) -> None:
    table = _table(console, "Targets", ("what", "need", "measured", ""))
    colours = {"met": "green", "missed": "red", "not measured": "dim"}
    for target in targets:
        sign = "<=" if target.at_most else ">="
        measured = "-" if target.measured is None else f"{target.measured:.2f}"
        table.add_row(target.what, f"{sign} {target.need:.2f}", measured, target.verdict, style=colours[target.verdict])
    console.print(table)
