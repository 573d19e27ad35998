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


class Verdicts:
    """`>= 0.82: missed` by case and by what it is judged in."""

    def __init__(self, targets: list[Row]) -> None:
        self.targets = targets

    def cell(self, what: str, ahead: bool = False) -> str:
        for target in self.targets:
            if target["what"] == what and target["against"].startswith("x ") == ahead and "token" not in target["against"]:
                return f"{'<=' if target['at_most'] else '>='} {target['need']:.2f}: {target['verdict']}"
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
    return table(("case", "ours, ms", "GFLOP/s", "of the ceiling", "target", "fastest peer, ms", "ahead", "target"), cells)


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


def decode_table(rows: list[Row]) -> str:
    cells = [
        [
            ours["label"],
            _milliseconds(ours),
            f"{ours['gbs']:.1f}",
            f"{ours['of_read']:.2f}",
            f"{ours['of_fma']:.2f}",
            *_peer_cells(ours, peers),
        ]
        for ours, peers in groups(rows)
    ]
    return table(("case", "ours, ms", "GB/s", "of read", "of FMA", "fastest peer, ms", "ahead"), cells)


def judged_table(targets: list[Row], wanted: Sequence[str]) -> str:
    """Targets that have no row in the other tables."""
    chosen = [target for target in targets if target["what"].startswith(tuple(wanted)) or "pages of" in target["what"]]
    return table(
        ("what", "in", "need", "got", ""),
        [
            [
                target["what"],
                target["against"],
                f"{'<=' if target['at_most'] else '>='} {target['need']:.2f}",
                "" if target["got"] is None else f"{target['got']:.2f}",
                target["verdict"],
            ]
            for target in chosen
        ],
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
    costs = [row for row in results["cases"] if row["section"] in ("features", "pairs")]
    speed = [row for row in results["cases"] if row not in costs]
    judged = ("2 threads", "append", "peak memory", "decode")
    for rows, title, text in (
        (speed, "Attention", lambda: attention_table(speed, Verdicts(targets))),
        (costs, "Speed of a feature per visible (query, key) pair, over plain attention's", lambda: features_table(costs)),
        (results["decode"], "Decode, one query a sequence", lambda: decode_table(results["decode"])),
        (results["kv_bench"], "Contiguous and paged caches, float16, K and V together", lambda: kv_table(results["kv_bench"])),
        (targets, "Other targets", lambda: judged_table(targets, judged)),
    ):
        if rows:
            parts += [f"**{title}**", text()]
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
