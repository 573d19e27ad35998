"""How much work the Metal kernels do for a call, beside what it needs and beside MLX's own kernel: `make metal-report`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS / folder) for folder in ("python", "metal_shim/lint", "metal_shim/tests")]

from cases import CASES  # noqa: E402
from counted import Row, rows_of, steel_row  # noqa: E402
from features import KERNELS, PLAIN, feature_costs  # noqa: E402

COLUMNS = {
    "flops": "flops / needed",
    "bytes": "bytes / needed",
    "threadgroup_bytes_a_flop": "tg bytes / flop",
    "barriers_a_block": "barriers / block",
    "instructions_a_product": "instr / product",
    "threadgroup_bytes": "tg memory",
    "registers": "registers",
    "stack_bytes": "stack bytes",
    "text_bytes": "text bytes",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the same numbers here")
    parser.add_argument("--case", help="only cases whose name contains this")
    arguments = parser.parse_args()
    print_line("instructions a score", *KERNELS)
    print_rule(1 + len(KERNELS))
    costs = []
    for cost in feature_costs():
        sign = "" if cost.feature == PLAIN else "+"
        print_line(cost.feature, *(f"{cost.instructions_a_score[kernel]:{sign}.2f}" for kernel in KERNELS))
        costs.append(cost)
    print()
    print_line("case", "kernel", *COLUMNS.values())
    print_rule(2 + len(COLUMNS))
    rows: list[Row] = []
    exceeded: list[str] = []
    for case in CASES:
        if arguments.case and arguments.case not in case.name:
            continue
        ours = rows_of(case)
        for row in [*ours, *([steel_row(case)] if case.steel else [])]:
            print_line(row.case, row.kernel, *(shown(getattr(row, name)) for name in COLUMNS))
            rows.append(row)
        exceeded += [complaint for row in ours for complaint in row.exceeded(case)]
    print()
    report = {"rows": [asdict(row) for row in rows], "features": [asdict(cost) for cost in costs], "exceeded": exceeded}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    for complaint in exceeded:
        print(f"FAIL {complaint}")
    return int(bool(exceeded))


# Markdown, which docs/metal.md takes as it is.


def print_line(first: str, *others: str) -> None:
    print(f"| {first:<38} | " + " | ".join(f"{other:>16}" for other in others) + " |", flush=True)


def print_rule(columns: int) -> None:
    print("|---" * columns + "|")


def shown(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
