"""One picture of a run: ours and the fastest peer as shares of the ceiling, case by case, and what each feature costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from case import DTYPE_NAMES
from peers import TITLES
from targets import OF_PLAIN, fastest, groups

Row = dict[str, Any]

OURS = "#1f6fb4"
COLOURS = {
    "torch": "#e08214",
    "onnxruntime": "#4d9221",
    "openvino": "#8073ac",
    "sdpa": "#7a7a7a",
    "reference": "#b9b9b9",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _head(axes: Axes, title: str, columns: int) -> None:
    """The title, and the legend between it and the data, where it covers neither."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, fontsize=8, frameon=False)
    axes.set_title(title, loc="left", pad=26)


def _plot_shares(axes: Axes, rows: list[Row], share: str, label: Callable[[Row], str], text: Callable[[Row], str]) -> None:
    """Two bars a case, ours and its fastest peer, each with its value; the ceiling is the dashed line."""
    labels: list[str] = []
    named: set[str] = set()
    for index, (ours, peers) in enumerate(groups(rows)):
        peer = fastest(peers)
        labels.append(label(ours))
        for offset, row in ((-0.2, ours), (0.2, peer)):
            if row is None:
                continue
            name = row["implementation"]
            colour = OURS if name == "ours" else COLOURS[name]
            legend = None if name in named else TITLES[name] if name == "ours" else f"fastest peer: {TITLES[name]}"
            named.add(name)
            axes.barh(index + offset, row[share], height=0.38, color=colour, label=legend)
            axes.text(row[share] + 0.008, index + offset, text(row), va="center", fontsize=7)
    axes.axvline(1.0, color="black", linestyle="--", linewidth=1, label="ceiling")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, max([1.0, *(row[share] for row in rows)]) * 1.25)
    axes.xaxis.set_major_formatter("{x:.0%}")


def _plot_speed(axes: Axes, rows: list[Row]) -> None:
    _plot_shares(
        axes,
        rows,
        "of_ceiling",
        label=lambda row: f"{row['label']} {row['steps'].replace('forward+backward', 'fwd+bwd')}",
        text=lambda row: (
            f"{row['of_ceiling']:.0%}  {row['ms']:.3g} ms" + (f"  of {row['ceiling']}" * (row["ceiling"] != "f32 FMA"))
        ),
    )
    axes.set_xlabel("share of the ceiling (float32 multiply-adds, unless a bar names another); longer is better")
    _head(axes, "Attention on CPU", columns=5)


def _plot_decode(axes: Axes, rows: list[Row]) -> None:
    _plot_shares(
        axes,
        rows,
        "of_read",
        label=lambda row: row["label"],
        text=lambda row: f"{row['gbs']:.1f} GB/s  {row['ms']:.3g} ms",
    )
    axes.set_xlabel("share of the memory read ceiling, K and V read once; longer is better")
    _head(axes, "Decode over a KV cache", columns=5)


def _plot_features(axes: Axes, rows: list[Row]) -> None:
    """One line a feature, one marker a shape and pass."""
    features = list(dict.fromkeys(row["feature"] for row in rows))
    series = list(dict.fromkeys((row["dtype"], row["seqlen"], row["head_dim"], row["steps"]) for row in rows))
    for index, (dtype, seqlen, head_dim, steps) in enumerate(series):
        chosen = [row for row in rows if (row["dtype"], row["seqlen"], row["head_dim"], row["steps"]) == series[index]]
        axes.scatter(
            [row["of_plain"] for row in chosen],
            [features.index(row["feature"]) + (index - (len(series) - 1) / 2) * 0.16 for row in chosen],
            marker=MARKERS[index % len(MARKERS)],
            s=34,
            label=f"{DTYPE_NAMES[dtype]} S{seqlen} D{head_dim} {steps}",
        )
    for row_index in range(1, len(features)):
        axes.axhline(row_index - 0.5, color="#e6e6e6", linewidth=0.8)
    axes.axvline(1.0, color="black", linewidth=1)
    needs = sorted({need for _, need in OF_PLAIN})
    for need in needs:
        axes.axvline(need, color="#b2182b", linestyle="--", linewidth=0.8)
        axes.text(need, len(features) - 0.5, f" {need:.2f}", color="#b2182b", fontsize=7, va="bottom")
    axes.set_yticks(range(len(features)), features, fontsize=9)
    axes.set_ylim(len(features) - 0.5, -0.5)
    values = [row["of_plain"] for row in rows]
    axes.set_xlim(max(0.0, min([*needs, *values]) - 0.08), max([1.0, *values]) + 0.08)
    axes.set_xlabel("speed per visible pair, of plain attention's; dashed: targets; right of 1.0: faster than plain")
    _head(axes, "What a feature costs", columns=2)


def save_plot(path: Path, results: dict[str, Any], subtitle: str) -> bool:
    """False, and no picture, where there is nothing to draw."""
    costs = [row for row in results["cases"] if row["section"] in ("features", "pairs")]
    features = [row for row in costs if row["implementation"] == "ours" and row["of_plain"]]
    speed = [row for row in results["cases"] if row not in costs] or costs
    left = [(draw, rows) for draw, rows in ((_plot_speed, speed),) if rows]
    right = [(draw, rows) for draw, rows in ((_plot_features, features), (_plot_decode, results["decode"])) if rows]
    columns = [panels for panels in (left, right) if panels]
    if not columns:
        return False
    height = max(5.0, 1.8 + 0.42 * len(groups(speed)), 5.5 * len(right))
    figure = plt.figure(figsize=(8.5 * len(columns), height), layout="constrained")
    for part, panels in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        for axes, (draw, rows) in zip(part.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            draw(axes, rows)
    figure.suptitle(subtitle, fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
