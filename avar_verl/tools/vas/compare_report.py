# SPDX-License-Identifier: Apache-2.0
"""`compare.html`: a comparison of checkpoints in one self-contained file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from avar_verl.objectives.vas import STATISTICS
from avar_verl.tools.figures import COLORS, Line, curves_figure, points_figure, scatter_figure
from avar_verl.tools.report import numbers, page
from avar_verl.tools.vas.compare import Measurement
from avar_verl.tools.vas.report import DIGITS, LABELS, band_text, bin_ticks, cell, estimate_text
from avar_verl.tools.vas.statistics import MEAN_STATISTICS

POINTS = (("image_share", False), ("ratio_of_means", True), ("vas", True))


def _colors(names: Sequence[str]) -> dict[str, str]:
    return {name: COLORS[at % len(COLORS)] for at, name in enumerate(names)}


def point_figures(result: Mapping[str, Any], query: str) -> list[Markup]:
    colors, overall = _colors(result["names"]), result["queries"][query]["overall"]
    figures = [
        points_figure(
            f"points-{query}-{key}",
            LABELS[key],
            [(name, colors[name], overall[name][key]) for name in result["names"]],
            ratios,
        )
        for key, ratios in POINTS
    ]
    return [figure for figure in figures if figure is not None]


def curve_figures(measurements: Sequence[Measurement], query: str) -> list[Markup]:
    """Image share by layer and, for responses, by position."""
    colors = _colors([one.name for one in measurements])
    parts = [(one.name, one.summary["queries"][query]) for one in measurements]
    by_layer = [
        Line.of(name, colors[name], part["layers"]["layer"], part["layers"]["image_share"]) for name, part in parts
    ]
    figures = [curves_figure(f"layers-{query}", by_layer, "image share", "layer")]
    if query == "response":
        # All measurements have the same bins; longer responses reach more of them.
        longest = max((part["positions"] for _, part in parts), key=lambda positions: positions[-1]["first"])
        starts = {one["first"]: at for at, one in enumerate(longest)}
        for key, ratios in (("image_share", False), ("ratio_of_means", True)):
            lines = []
            for name, part in parts:
                positions = [one for one in part["positions"] if one["first"] in starts]
                x = [starts[one["first"]] for one in positions]
                lines.append(Line.of(name, colors[name], x, [one[key] for one in positions]))
            label = "token of the response"
            figures.append(curves_figure(f"positions-{key}", lines, LABELS[key], label, ratios, bin_ticks(longest)))
    return [figure for figure in figures if figure is not None]


def scatter_figures(result: Mapping[str, Any], query: str) -> list[dict[str, Any]]:
    """For every correlated statistic, a scatter plot with the last benchmark (the mean, if there are several)."""
    if result["scores"] is None:
        return []
    entry, colors = result["queries"][query], _colors(result["names"])
    benchmark = list(result["scores"])[-1]
    out = []
    for key, by_benchmark in entry["correlation"].items():
        x = [float(numbers(entry["overall"][name][key]["value"])) for name in result["names"]]
        points = [
            (name, colors[name], value, score)
            for name, value, score in zip(result["names"], x, result["scores"][benchmark], strict=True)
        ]
        figure = scatter_figure(f"scatter-{query}-{key}", LABELS[key], benchmark, points, key == "vas")
        part = by_benchmark[benchmark]
        caption = f"Pearson {estimate_text(part['pearson'])}, Spearman {estimate_text(part['spearman'])}"
        out.append({"svg": figure or Markup(), "caption": caption})
    return out


def correlation_rows(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, by_benchmark in entry.get("correlation", {}).items():
        for benchmark, part in by_benchmark.items():
            cells = [estimate_text(part["pearson"]), estimate_text(part["spearman"])]
            counts = {"models": part["num_models"], "undefined": part["undefined"]}
            rows.append({"statistic": LABELS[key], "benchmark": benchmark, "cells": cells, **counts})
    return rows


def query_section(result: Mapping[str, Any], measurements: Sequence[Measurement], query: str) -> dict[str, Any]:
    entry = result["queries"][query]
    rows = []
    for name in result["names"]:
        overall, difference = entry["overall"][name], entry["difference"].get(name)
        rows.append(
            {
                "name": name,
                "color": _colors(result["names"])[name],
                "num_samples": entry["num_samples"][name],
                "band": band_text(overall["vas"]),
                "cells": {key: cell(overall[key], DIGITS.get(key, 2)) for key in STATISTICS},
                "shared": None if difference is None else difference["num_samples"],
                "difference": None
                if difference is None
                else {key: cell(difference[key], DIGITS.get(key, 2)) for key in MEAN_STATISTICS},
            }
        )
    return {
        "name": query,
        "rows": rows,
        "unpaired": [name for name, part in entry["difference"].items() if part is None],
        "points": point_figures(result, query),
        "curves": curve_figures(measurements, query),
        "scatter": scatter_figures(result, query),
        "correlations": correlation_rows(entry),
    }


def write_compare_report(path: Path, result: Mapping[str, Any], measurements: Sequence[Measurement]) -> None:
    """Write the report of the content of `compare.json`."""
    text = page(
        "vas/compare.html.j2",
        names=result["names"],
        sources=list(zip(result["names"], result["models"], result["data"], strict=True)),
        sections=[query_section(result, measurements, query) for query in result["queries"]],
        labels={key: LABELS[key] for key in STATISTICS},
        difference_labels={key: LABELS[key] for key in MEAN_STATISTICS},
        scores=result["scores"],
        num_draws=result["bootstrap"]["draws"],
    )
    path.write_text(text, encoding="utf-8")
