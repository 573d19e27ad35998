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
    costs = feature_costs()
    print(f"{'instructions a score':<40}" + "".join(f"{kernel:>17}" for kernel in KERNELS))
    for cost in costs:
        shown = (f"{cost.instructions_a_score[kernel]:{'' if cost.feature == PLAIN else '+'}.2f}" for kernel in KERNELS)
        print(f"{cost.feature:<40}" + "".join(f"{value:>17}" for value in shown))
    rows: list[Row] = []
    exceeded: list[str] = []
    print(f"\n{'case':<40}{'kernel':<23}" + "".join(f"{title:>17}" for title in COLUMNS.values()))
    for case in CASES:
        if arguments.case and arguments.case not in case.name:
            continue
        ours = rows_of(case)
        for row in [*ours, *([steel_row(case)] if case.steel else [])]:
            print(line_of(row), flush=True)
            rows.append(row)
        exceeded += [complaint for row in ours for complaint in row.exceeded(case)]
    report = {"rows": [asdict(row) for row in rows], "features": [asdict(cost) for cost in costs], "exceeded": exceeded}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    for complaint in exceeded:
        print(f"FAIL {complaint}")
    return int(bool(exceeded))


def line_of(row: Row) -> str:
    values = [getattr(row, name) for name in COLUMNS]
    shown = ["-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
    return f"{row.case:<40}{row.kernel:<23}" + "".join(f"{value:>17}" for value in shown)


if __name__ == "__main__":
    sys.exit(main())
