"""README's tables from the JSON of a run, so that no number in it is typed by hand.

  python benchmarks/readme_tables.py bench-out/attention.json
  python benchmarks/readme_tables.py bench-out/attention.json --into README.md

--into replaces what lies between the lines `<!-- benchmark -->` and `<!-- /benchmark -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from case import DTYPE_NAMES, FORWARD, FORWARD_BACKWARD
from kv_bench import COLUMNS, summary
from peers import TITLES
from targets import fastest, groups

Row = dict[str, Any]

BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"


def table(columns: Sequence[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _milliseconds(row: Row) -> str:
    return f"{row['ms']:.3g}"


def _peer_cells(ours: Row, peers: list[Row]) -> list[str]:
    peer = fastest(peers)
    if peer is None:
        return ["", ""]
    return [f"{TITLES[peer['implementation']]} {_milliseconds(peer)}", f"{peer['ms'] / ours['ms']:.2f}x"]


def _need(target: Row) -> str:
    return f"{'<=' if target['at_most'] else '>='} {target['need']:.{0 if target['against'] == 'us' else 2}f}"


class Verdicts:
    """What the targets say of a case, by its name: one of its own terms, one of how far it is ahead."""

    def __init__(self, targets: list[Row]) -> None:
        self.targets = targets

    def cell(self, what: str, ahead: bool = False) -> str:
        for target in self.targets:
            if target["what"] == what and target["against"].startswith("x ") == ahead:
                return f"{_need(target)} {'' if ahead else target['against']}".rstrip() + f": {target['verdict']}"
        return ""


def attention_table(rows: list[Row], verdicts: Verdicts) -> str:
    cells = []
    for ours, peers in groups(rows):
        what = f"{ours['label']} {ours['steps']}"
        share = f"{ours['of_ceiling']:.2f}" + (f" of {ours['ceiling']}" if ours["ceiling"] != "f32 FMA" else "")
        cells.append(
            [
                what,
                _milliseconds(ours),
                f"{ours['gflops']:.0f}",
                share,
                verdicts.cell(what),
                *_peer_cells(ours, peers),
                verdicts.cell(what, ahead=True),
            ]
        )
    return table(("case", "ours, ms", "GFLOP/s", "of the ceiling", "need", "fastest peer, ms", "ahead", "need"), cells)


def features_table(rows: list[Row]) -> str:
    ours = [row for row in rows if row["implementation"] == "ours" and row["of_plain"]]
    shapes = list(dict.fromkeys((row["dtype"], row["head_dim"], row["steps"]) for row in ours))
    values = {(row["feature"], row["dtype"], row["head_dim"], row["steps"]): f"{row['of_plain']:.2f}" for row in ours}
    names = {FORWARD: "forward", FORWARD_BACKWARD: "forward + backward"}
    columns = [f"{DTYPE_NAMES[dtype]} D{dim} {names[steps]}" for dtype, dim, steps in shapes]
    return table(
        ("feature", *columns),
        [
            [feature, *(values.get((feature, *shape), "") for shape in shapes)]
            for feature in dict.fromkeys(r["feature"] for r in ours)
        ],
    )


def decode_table(rows: list[Row], verdicts: Verdicts) -> str:
    cells = []
    for ours, peers in groups(rows):
        what = f"decode {ours['label']}"
        rates = [f"{ours[rate]:.1f}" for rate in ("gbs", "read_gbs")]
        shares = [f"{ours[share]:.2f}" for share in ("of_read", "of_fma")]
        judged = [verdicts.cell(what), *_peer_cells(ours, peers), verdicts.cell(what, ahead=True)]
        cells.append([ours["label"], _milliseconds(ours), *rates, *shares, *judged])
    columns = ("case", "ours, ms", "GB/s", "read, GB/s", "of read", "of FMA", "need", "fastest peer, ms", "ahead", "need")
    return table(columns, cells)


def paged_table(rows: list[Row]) -> str:
    pools = list(rows[0]["paged_time"])
    return table(("case", *pools), [[row["label"], *(f"{row['paged_time'][pages]:.3f}" for pages in pools)] for row in rows])


def others_table(targets: list[Row]) -> str:
    """Targets that no other table has."""
    return table(
        ("what", "in", "need", "got", ""),
        [[t["what"], t["against"], _need(t), "" if t["got"] is None else f"{t['got']:.2f}", t["verdict"]] for t in targets],
    )


def kv_table(rows: list[Row]) -> str:
    return table(COLUMNS, [summary(row).split(" | ") for row in rows])


def document(results: dict[str, Any]) -> str:
    machine, ceilings, targets = results["machine"], results["ceilings"], results["targets"]
    levels = ", ".join(f"{level} {value:.0f}" for level, value in ceilings["gflops"].items())
    parts = [
        f"{machine['cpu']}, {machine['threads']} threads, `{ceilings['level']}` kernels, MLX {machine['mlx']}. Ceilings of the "
        f"same run: multiply-adds {levels} GFLOP/s; reads of memory {ceilings['read_gbs']:.1f} GB/s, of the last-level cache "
        f"{ceilings['cache_gbs']:.1f} GB/s. Targets met: {sum(t['verdict'] == 'met' for t in targets)} of {len(targets)}."
    ]
    verdicts = Verdicts(targets)
    costs = [row for row in results["cases"] if row["section"] in ("features", "pairs")]
    speed = [row for row in results["cases"] if row not in costs]
    others = [target for target in targets if target["what"].startswith(("2 threads", "append", "peak memory"))]
    for rows, title, make in (
        (speed, "Attention", lambda rows: attention_table(rows, verdicts)),
        (costs, "Speed of a feature per visible (query, key) pair, over plain attention's", features_table),
        (results["decode"], "Decode, one query a sequence", lambda rows: decode_table(rows, verdicts)),
        (results["paged"], "Time in pages over the contiguous cache's, medians of interleaved pairs", paged_table),
        (results["kv_bench"], "Contiguous and paged caches, float16, K and V together", kv_table),
        (others, "Threads, appends and memory", others_table),
    ):
        if rows:
            parts += [f"**{title}**", make(rows)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--into", type=Path, metavar="FILE")
    args = parser.parse_args()
    made = document(json.loads(args.json.read_text()))
    if args.into is None:
        sys.stdout.write(made)
        return 0
    text = args.into.read_text()
    if BEGIN not in text or END not in text:
        parser.error(f"{args.into} has no lines {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    args.into.write_text(f"{before}{BEGIN}\n{made}{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
