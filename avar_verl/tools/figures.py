# SPDX-License-Identifier: Apache-2.0
"""Figures of all tools: style, and conversion to inline SVG or a PNG file.

Shape suffixes: L = layers, H = query heads
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from avar_verl.tools.report import number_text, numbers

# Okabe and Ito's palette, which is distinguishable with the common kinds of colour blindness.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#222222", "#7a7a7a"
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
}
MAP = {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}  # Changes of STYLE for a map of cells.
WIDE = 10.0  # From this ratio of largest to smallest value, a scale is logarithmic.
FEW = 64  # With at most this many cells, a heat map has a number in each.


@contextmanager
def drawing(width: float, height: float, **style: Any) -> Iterator[Figure]:
    """A figure of the given size in inches, drawn in STYLE with the changes `style`."""
    with matplotlib.rc_context({**STYLE, **style}):
        yield Figure(figsize=(width, height))


def svg(figure: Figure, name: str, alt: str) -> Markup:
    """A figure as inline SVG. `name` is unique in the page: SVG ids are global there."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={key: None for key in ("Creator", "Date", "Format", "Type")})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # Nothing refers to groups, and all figures have the same ids for them.
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))


def save_png(figure: Figure, path: Path) -> None:
    """A figure as a file."""
    figure.savefig(path, dpi=120)


def legend_above(axes: Axes, number: int) -> None:
    """A legend above the axes, if there is more than one curve."""
    if number > 1:
        columns = number if number < 4 else 2
        axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 0.98), ncols=columns, borderaxespad=0, columnspacing=1.2)


def heat_figure(name: str, what: str, maps: Mapping[str, tuple[Any, Any]], layers: Sequence[int]) -> Markup:
    """Layer by head: image share above, log10 of the mean ratio image / system below; one scale per row.

    Args:
        what: whose attention it is, for the text alternative.
        maps: column title -> (share_LH, ratio_LH).
        layers: indices of the layers.
    """
    shares = [numbers(share) for share, _ in maps.values()]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [np.log10(numbers(ratio)) for _, ratio in maps.values()]
    finite = np.concatenate([log_LH[np.isfinite(log_LH)] for log_LH in logs])
    bound = max(1.0, float(np.abs(finite).max(initial=0.0)))
    rows = (("image share", shares, "viridis", 0.0, 1.0), ("log10(image / system)", logs, "PuOr_r", -bound, bound))
    with drawing(10.5, 4.9, **MAP) as figure:
        place = {"left": 0.05, "right": 0.95, "bottom": 0.09, "top": 0.94, "wspace": 0.06, "hspace": 0.07}
        grid = figure.subplots(2, len(maps), sharex=True, sharey=True, squeeze=False, gridspec_kw=place)
        for axes_row, (label, values, colors, low, high) in zip(grid, rows, strict=True):
            for axes, values_LH in zip(axes_row, values, strict=True):
                image = _draw_cells(axes, values_LH, colors, low, high, layers)
            figure.colorbar(image, ax=list(axes_row), label=label, pad=0.012, fraction=0.03)
            axes_row[0].set_ylabel("layer")
        for axes, title in zip(grid[0], maps, strict=True):
            axes.set_title(title)
        for axes in grid[-1]:
            axes.set_xlabel("head")
        alt = ", ".join(f"{title} {number_text(np.mean(share))}" for title, share in zip(maps, shares, strict=True))
        return svg(figure, name, f"{what} by layer and head; mean image share: {alt}.")


def _draw_cells(axes, values_LH: np.ndarray, colors: str, low: float, high: float, layers: Sequence[int]):
    """One map. A small map has numbers in its cells; a non-finite cell always has a word."""
    colormap = matplotlib.colormaps[colors].with_extremes(bad="#ffffff")
    shown_LH = np.where(np.isinf(values_LH), np.sign(values_LH) * high, values_LH)
    image = axes.imshow(shown_LH, cmap=colormap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    num_layers, num_heads = values_LH.shape
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.xaxis.set_view_interval(-0.5, num_heads - 0.5)
    step = max(1, math.ceil(num_layers / 10))
    axes.set_yticks(range(0, num_layers, step), [str(layers[index]) for index in range(0, num_layers, step)])
    for (layer, head), value in np.ndenumerate(values_LH):
        if values_LH.size > FEW and math.isfinite(value):
            continue
        text = f"{value:.2f}" if low == 0 else f"{round(value, 1) + 0.0:.1f}"  # + 0.0 avoids minus zero.
        text = text if math.isfinite(value) else "n/a" if math.isnan(value) else "inf" if value > 0 else "-inf"
        red, green, blue, _ = colormap(image.norm(shown_LH[layer, head])) if not math.isnan(value) else (1, 1, 1, 1)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(head, layer, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return image


@dataclass(frozen=True)
class Line:
    """One curve, with the interval of every point if there is one."""

    label: str
    color: str
    x: np.ndarray
    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    style: str = "-"

    @classmethod
    def of(cls, label: str, color: str, x: Sequence[float], parts: Mapping[str, Any] | Sequence[Mapping]) -> "Line":
        """`parts`: `value`, `low` and `high` as lists, or a list of dicts with one number each."""
        if not isinstance(parts, Mapping):
            parts = {key: [part[key] for part in parts] for key in ("value", "low", "high")}
        ends = (None if parts[key] is None else numbers(parts[key]) for key in ("low", "high"))
        return cls(label, color, np.asarray(x, dtype=float), numbers(parts["value"]), *ends)


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
    name: str,
    lines: Sequence[Line],
    y_label: str,
    x_label: str,
    ratios: bool = False,
    x_ticks: Mapping | None = None,
    what: str | None = None,
) -> Markup | None:
    """Curves with their intervals as bands; None if no value is finite (and positive on a log scale).

    Args:
        ratios: the scale is logarithmic if the values span a factor of WIDE.
        x_ticks: position to label, default integers.
        what: used instead of `y_label` in the text alternative.
    """
    log_y = ratios and _is_wide(np.concatenate([line.value for line in lines]))
    drawn = []
    for line in lines:
        ok = np.isfinite(line.value) & ((line.value > 0) | (not log_y))
        if ok.any():
            drawn.append((line, ok))
    if not drawn:
        return None
    with drawing(3.6, 2.5) as figure:
        # A fixed layout: matplotlib's automatic layouts take half a second per figure.
        top = 0.91 if len(drawn) < 4 else 0.83  # Room for one or two lines of legend.
        axes = figure.subplots(gridspec_kw={"left": 0.17, "right": 0.98, "bottom": 0.18, "top": top})
        for line, ok in drawn:
            marker = "." if len(line.x) <= 40 else None
            axes.plot(line.x, np.where(ok, line.value, math.nan), line.style, marker=marker, markersize=4,
                      color=line.color, linewidth=1.2, label=line.label)  # fmt: skip
            if line.low is not None:
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
        return svg(figure, name, f"{what or y_label} by {x_label}: {alt}.")


def points_figure(
    name: str, label: str, rows: Sequence[tuple[str, str, Mapping[str, Any]]], ratios: bool = False
) -> Markup | None:
    """One number per checkpoint with its interval, one below the other; rows: (checkpoint, color, number).

    None if no value is finite (and positive on a log scale). `ratios` as in `curves_figure`.
    """
    log_x = ratios and _is_wide(numbers([part["value"] for _, _, part in rows]))
    shown = []
    for at, (title, color, part) in enumerate(rows):
        value, low, high = (float(numbers(part[key])) for key in ("value", "low", "high"))
        if math.isfinite(value) and (value > 0 or not log_x):
            shown.append((at, title, color, value, low, high))
    if not shown:
        return None
    height = 0.75 + 0.28 * len(rows)
    with drawing(3.6, height) as figure:
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
    """Scores over a statistic, one labelled point per checkpoint: (checkpoint, color, x, y). None for fewer than two
    points.
    """
    log_x = ratios and _is_wide(np.array([x for _, _, x, _ in points]))
    points = [point for point in points if all(map(math.isfinite, point[2:])) and (point[2] > 0 or not log_x)]
    if len(points) < 2:
        return None
    with drawing(3.6, 2.7) as figure:
        axes = figure.subplots(gridspec_kw={"left": 0.15, "right": 0.96, "bottom": 0.17, "top": 0.96})
        for at, (title, color, x, y) in enumerate(sorted(points, key=lambda point: point[2])):
            axes.plot([x], [y], "o", markersize=5, color=color)
            # Alternately above and below, because neighbours may be very close.
            axes.annotate(title, (x, y), (4, (-11, 5)[at % 2]), textcoords="offset points", fontsize=8)
        axes.margins(0.18)
        if log_x:
            axes.set_xscale("log")
            _log_axis(axes.xaxis)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        alt = "; ".join(f"{title} ({number_text(x)}, {number_text(y)})" for title, _, x, y in points)
        return svg(figure, name, f"{y_label} over {x_label}: {alt}.")
