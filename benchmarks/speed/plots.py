"""Small plots of measurements: points in, PNG files out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

NAMES = {"auto": "own pieces", "none": "libraries", "plain": "plain PEFT"}
COLOURS = {"auto": "#0b6e4f", "none": "#c1666b", "plain": "#4059ad"}
SMOOTHED = 10  # steps


def draw_lengths(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Microseconds a token over the tokens of a pass, and over the tokens of a document; peak memory over a pass."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    by_pass = [point for point in points if point["document_tokens"] == 256]
    by_document = [point for point in points if point["pass_tokens"] == 8192]
    draw_ways(left, by_pass, "pass_tokens", "microseconds_per_token", 1.0)
    left.set(title="documents of 256 tokens", xlabel="tokens of a pass", ylabel="microseconds a token")
    draw_ways(middle, by_document, "document_tokens", "microseconds_per_token", 1.0)
    middle.set(title="passes of 8,192 tokens", xlabel="tokens of a document", ylabel="microseconds a token")
    draw_ways(right, by_pass, "pass_tokens", "peak_bytes", 1e-9)
    right.set(title="documents of 256 tokens", xlabel="tokens of a pass", ylabel="peak memory, GB")
    save(figure, path)


def draw_ways(axes: Axes, points: Sequence[Mapping[str, Any]], x: str, y: str, factor: float) -> None:
    """One line for each way of computing, over a logarithmic axis of lengths."""
    for way in dict.fromkeys(point["way"] for point in points):
        line = sorted((point[x], point[y] * factor) for point in points if point["way"] == way)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3.5, color=COLOURS[way], label=NAMES[way])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({point[x] for point in points}))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if points:
        axes.legend(frameon=False)


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """By quantization the smoothed losses of the ways, and their difference from the plain one."""
    figure, axes = pyplot.subplots(
        2, len(curves), figsize=(4.6 * len(curves), 5), squeeze=False, constrained_layout=True
    )
    for column, (quantization, losses) in enumerate(curves.items()):
        upper, lower = axes[0][column], axes[1][column]
        for width, (way, values) in zip((3.2, 2.0, 1.0), losses.items(), strict=False):
            upper.plot(range(1, len(values) + 1), smooth(values), color=COLOURS[way], linewidth=width, label=NAMES[way])
            if way != "plain":
                difference = [1000 * (a - b) for a, b in zip(values, losses["plain"], strict=True)]
                lower.plot(range(1, len(values) + 1), difference, color=COLOURS[way], linewidth=0.8, label=NAMES[way])
        upper.set(title=f"weights: {quantization}", xlabel="step", ylabel="loss, mean of 10 steps")
        lower.set(xlabel="step", ylabel="less plain PEFT's loss, millinat")
        for each in (upper, lower):
            each.grid(alpha=0.3)
            each.legend(frameon=False)
    save(figure, path)


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, ten at most."""
    windows = [values[max(0, end - SMOOTHED) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def save(figure: Any, path: Path) -> None:
    """Without a date, so that the same figures give the same bytes."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
