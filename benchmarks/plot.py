"""One picture of a run: speed against the peers and the ceiling, and what each feature costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from cases import DTYPE_NAMES
from report import IMPLEMENTATION_NAMES, gflops

Row = dict[str, Any]

COLOURS = {
    "ours": "#1f6fb4",
    "torch": "#e08214",
    "onnxruntime": "#4d9221",
    "openvino": "#8073ac",
    "sdpa": "#7a7a7a",
    "reference": "#b9b9b9",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
TARGET_OF_PLAIN = 0.8


def _head(axes: Axes, title: str, columns: int) -> None:
    """The title, and the legend between it and the data, where it covers neither."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, fontsize=8, frameon=False)
    axes.set_title(title, loc="left", pad=38)


@dataclass(frozen=True)
class Bar:
    case: str
    implementation: str
    value: float
    text: str


def _plot_bars(axes: Axes, bars: list[Bar], ceiling: float, ceiling_name: str) -> None:
    """One group of bars a case, ours first, each with its value; the ceiling is the dashed line."""
    y = 0.0
    ticks, labels, seen = [], [], set()
    for case in dict.fromkeys(bar.case for bar in bars):
        group = [bar for bar in bars if bar.case == case]
        top = y
        for bar in group:
            name = bar.implementation
            legend = None if name in seen else IMPLEMENTATION_NAMES[name]
            seen.add(name)
            axes.barh(y, bar.value, height=0.85, color=COLOURS[name], label=legend)
            axes.text(bar.value + ceiling * 0.008, y, bar.text, va="center", fontsize=8)
            y += 1.0
        ticks.append((top + y - 1.0) / 2)
        labels.append(case)
        y += 0.6
    axes.axvline(ceiling, color="black", linestyle="--", linewidth=1, label=ceiling_name)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_ylim(y - 0.6, -1.0)
    axes.set_xlim(0, max([ceiling, *(bar.value for bar in bars)]) * 1.14)


def _plot_speed(axes: Axes, rows: list[Row], ceiling: float) -> None:
    bars = [
        Bar(
            f"{row['label']}\n{row['steps']}", row["implementation"], row["gflops"], f"{gflops(row)}  ({row['of_ceiling']:.0%})"
        )
        for row in rows
    ]
    _plot_bars(axes, bars, ceiling, f"FMA ceiling, {ceiling:.0f} GFLOP/s")
    axes.set_xlabel("GFLOP/s (in brackets: share of the ceiling); longer is better")
    _head(axes, "Attention on CPU", columns=5)


def _plot_decode(axes: Axes, rows: list[Row], ceiling: float) -> None:
    bars = [Bar(row["label"], row["implementation"], row["gbs"], f"{row['gbs']:.1f}  ({row['of_read']:.0%})") for row in rows]
    _plot_bars(axes, bars, ceiling, f"memory read ceiling, {ceiling:.1f} GB/s")
    axes.set_xlabel("GB/s of K and V read once (in brackets: share of the ceiling); longer is better")
    _head(axes, "Decode over a KV cache", columns=4)


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
    axes.axvline(TARGET_OF_PLAIN, color="#b2182b", linestyle="--", linewidth=1, label=f"target {TARGET_OF_PLAIN:.2f}")
    axes.set_yticks(range(len(features)), features, fontsize=9)
    axes.set_ylim(len(features) - 0.5, -0.5)
    low = min([TARGET_OF_PLAIN, *(row["of_plain"] for row in rows)])
    axes.set_xlim(max(0.0, low - 0.08), max([1.0, *(row["of_plain"] for row in rows)]) + 0.08)
    axes.set_xlabel("speed per visible pair, of plain attention's; right of 1.0: faster than plain")
    _head(axes, "What a feature costs", columns=3)


def save_plot(path: Path, rows: list[Row], ceiling: float, decode: list[Row], read_gbs: float, subtitle: str) -> None:
    speed = [row for row in rows if row["section"] != "features"] or rows
    features = [row for row in rows if row["section"] == "features" and row["implementation"] == "ours" and row["of_plain"]]
    cases = len({(row["label"], row["steps"]) for row in speed})
    height = max(4.5, 1.6 + 0.2 * len(speed) + 0.14 * cases)
    columns = 1 + bool(features) + bool(decode)
    figure, axes = plt.subplots(1, columns, figsize=(8.5 * columns, height), squeeze=False, layout="constrained")
    _plot_speed(axes[0][0], speed, ceiling)
    if features:
        _plot_features(axes[0][1], features)
    if decode:
        _plot_decode(axes[0][-1], decode, read_gbs)
    figure.suptitle(subtitle, fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
