# SPDX-License-Identifier: Apache-2.0
"""Figures of the reports, as inline SVG.

Shape suffixes: L = layers, H = query heads
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from avar_verl.tools.plots import RC, legend_above, number_text, numbers, svg

# Okabe and Ito's palette.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#7a7a7a")
QUERY_COLORS = {"user": COLORS[0], "response": COLORS[1]}
LABELS = {
    "vas": "VAS",
    "vas_median": "VAS, median head",
    "ratio_of_means": "ratio of means",
    "log_ratio": "log ratio",
    "image_share": "image share",
    "image_mass": "image mass",
    "system_mass": "system mass",
}
WIDE = 10.0  # Largest over smallest value from which on a scale is logarithmic.


@dataclass(frozen=True)
class Line:
    """One curve with the interval of every point."""

    label: str
    color: str
    x: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, label: str, color: str, x: Sequence[float], parts: Mapping[str, Any] | Sequence[Mapping]) -> "Line":
        """`parts`: `value`, `low` and `high` as lists, or a list of dicts with one number each."""
        if not isinstance(parts, Mapping):
            parts = {key: [part[key] for part in parts] for key in ("value", "low", "high")}
        value = numbers(parts["value"])
        ends = (np.full_like(value, math.nan) if parts[key] is None else numbers(parts[key]) for key in ("low", "high"))
        return cls(label, color, np.asarray(x, dtype=float), value, *ends)


def _log_axis(axis) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6))
    axis.set_major_formatter(
        lambda value, _: f"{value:,.0f}" if 1 <= value < 1e4 else f"{value:.0e}".replace("e+", "e")
    )
    axis.set_minor_formatter(NullFormatter())


def _is_wide(values: np.ndarray) -> bool:
    positive = values[np.isfinite(values) & (values > 0)]
    return positive.size > 0 and positive.max() >= WIDE * positive.min()


def curves_figure(
    name: str, lines: Sequence[Line], y_label: str, x_label: str, ratios: bool = False, x_ticks: Mapping | None = None
) -> Markup | None:
    """Curves with their intervals as bands; None where no value is finite (and positive on a log scale).

    ratios: the scale is logarithmic where the values span a factor of WIDE. x_ticks: position to label, default
    integers.
    """
    log_y = ratios and _is_wide(np.concatenate([line.value for line in lines]))
    drawn = []
    for line in lines:
        ok = np.isfinite(line.value) & ((line.value > 0) | (not log_y))
        if ok.any():
            drawn.append((line, ok))
    if not drawn:
        return None
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(3.6, 2.5))
        top = 0.91 if len(drawn) < 4 else 0.83
        axes = figure.subplots(gridspec_kw={"left": 0.17, "right": 0.98, "bottom": 0.18, "top": top})
        for line, ok in drawn:
            marker = "." if len(line.x) <= 40 else None
            axes.plot(line.x, np.where(ok, line.value, math.nan), marker=marker, markersize=4, color=line.color,
                      linewidth=1.2, label=line.label)  # fmt: skip
            band = ok & np.isfinite(line.low) & np.isfinite(line.high) & ((line.low > 0) | (not log_y))
            axes.fill_between(line.x, line.low, line.high, where=band, color=line.color, alpha=0.2, linewidth=0)
        if log_y:
            axes.set_yscale("log")
            _log_axis(axes.yaxis)
        if x_ticks is None:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        else:
            axes.xaxis.set_major_locator(FixedLocator(list(x_ticks)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: x_ticks.get(value, "")))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        legend_above(axes, len(drawn))
        alt = "; ".join(
            f"{line.label} from {number_text(line.value[0])} to {number_text(line.value[-1])}" for line in lines
        )
        return svg(figure, name, f"{y_label} by {x_label}: {alt}.")


def bin_ticks(positions: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Labels of the bins by their number: the first position of each, of every other one where there are many."""
    step = 1 if len(positions) <= 8 else 2
    return {index: f"{one['first']:,}" for index, one in enumerate(positions) if index % step == 0}


def points_figure(
    name: str, label: str, rows: Sequence[tuple[str, str, Mapping[str, Any]]], ratios: bool = False
) -> Markup | None:
    """One number of every checkpoint with its interval, one below the other; rows: (checkpoint, color, number).

    None where no value is finite (and positive on a log scale). `ratios` as in `curves_figure`.
    """
    log_x = ratios and _is_wide(numbers([part["value"] for _, _, part in rows]))
    shown = []
    for at, (title, color, part) in enumerate(rows):
        value, low, high = (float(numbers(part[key])) for key in ("value", "low", "high"))
        if math.isfinite(value) and (value > 0 or not log_x):
            shown.append((at, title, color, value, low, high))
    if not shown:
        return None
    with matplotlib.rc_context(RC):
        height = 0.75 + 0.28 * len(rows)
        figure = Figure(figsize=(3.6, height))
        axes = figure.subplots(gridspec_kw={"left": 0.27, "right": 0.97, "bottom": 0.5 / height, "top": 0.97})
        for at, _, color, value, low, high in shown:
            axes.plot([value], [at], "o", markersize=4.5, color=color)
            if math.isfinite(low) and math.isfinite(high) and (low > 0 or not log_x):
                axes.hlines(at, low, high, color, linewidth=1.6)
        axes.set_yticks(range(len(rows)), [title for title, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        if log_x:
            axes.set_xscale("log")
            _log_axis(axes.xaxis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(label)
        alt = ", ".join(f"{title} {number_text(value)}" for _, title, _, value, _, _ in shown)
        return svg(figure, name, f"{label}: {alt}.")


def scatter_figure(
    name: str, x_label: str, y_label: str, points: Sequence[tuple[str, str, float, float]], ratios: bool = False
) -> Markup | None:
    """Scores over a statistic, one labelled point a checkpoint: (checkpoint, color, x, y). None of fewer than two."""
    log_x = ratios and _is_wide(np.array([x for _, _, x, _ in points]))
    points = [point for point in points if all(map(math.isfinite, point[2:])) and (point[2] > 0 or not log_x)]
    if len(points) < 2:
        return None
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(3.6, 2.7))
        axes = figure.subplots(gridspec_kw={"left": 0.15, "right": 0.96, "bottom": 0.17, "top": 0.96})
        for at, (title, color, x, y) in enumerate(sorted(points, key=lambda point: point[2])):
            axes.plot([x], [y], "o", markersize=5, color=color)
            # Above and below by turns, since neighbours may have nearly the same place.
            axes.annotate(title, (x, y), (4, (-11, 5)[at % 2]), textcoords="offset points", fontsize=8)
        axes.margins(0.18)
        if log_x:
            axes.set_xscale("log")
            _log_axis(axes.xaxis)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        alt = "; ".join(f"{title} ({number_text(x)}, {number_text(y)})" for title, _, x, y in points)
        return svg(figure, name, f"{y_label} over {x_label}: {alt}.")
