# SPDX-License-Identifier: Apache-2.0
"""`compare.html`: a comparison of checkpoints in one self-contained file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from avar_verl.objectives.vas import STATISTICS
from avar_verl.tools.figures import COLORS, Line, curves_figure, points_figure, scatter_figure
from avar_verl.tools.report import numbers, page
from avar_verl.tools.vas.compare import Measurement, uncompared_text
from avar_verl.tools.vas.report import DIGITS, LABELS, band_text, bin_ticks, cell, estimate_text
from avar_verl.tools.vas.score import DEPENDENCY
from avar_verl.tools.vas.show import CORRUPTED
from avar_verl.tools.vas.statistics import MEAN_STATISTICS

POINTS = (("image_share", False), ("ratio_of_means", True), ("vas", True))


def _colors(names: Sequence[str]) -> dict[str, str]:
    return {name: COLORS[at % len(COLORS)] for at, name in enumerate(names)}


def point_figures(
    result: Mapping[str, Any], entry: Mapping[str, Any], query: str, points: Sequence[tuple[str, bool]]
) -> list[Markup]:
    colors, overall = _colors(result["names"]), entry["overall"]
    figures = [
        points_figure(
            f"points-{query}-{key}",
            LABELS[key],
            [(name, colors[name], overall[name][key]) for name in result["names"]],
            ratios,
        )
        for key, ratios in points
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
        figures += position_figures(parts, (("image_share", False), ("ratio_of_means", True)), colors)
    return [figure for figure in figures if figure is not None]


def position_figures(
    parts: Sequence[tuple[str, Mapping[str, Any]]], keys: Sequence[tuple[str, bool]], colors: Mapping[str, str]
) -> list[Markup | None]:
    """Curves over the position in the response. parts: (checkpoint, a summary with `positions`)."""
    # All measurements have the same bins; longer responses reach more of them.
    longest = max((part["positions"] for _, part in parts), key=lambda positions: positions[-1]["first"])
    starts = {one["first"]: at for at, one in enumerate(longest)}
    figures = []
    for key, ratios in keys:
        lines = []
        for name, part in parts:
            positions = [one for one in part["positions"] if one["first"] in starts]
            x = [starts[one["first"]] for one in positions]
            lines.append(Line.of(name, colors[name], x, [one[key] for one in positions]))
        label = "token of the response"
        figures.append(curves_figure(f"positions-{key}", lines, LABELS[key], label, ratios, bin_ticks(longest)))
    return figures


def scatter_figures(result: Mapping[str, Any], entry: Mapping[str, Any], query: str) -> list[dict[str, Any]]:
    """For every correlated statistic, a scatter plot with the last benchmark (the mean, if there are several)."""
    if result["scores"] is None:
        return []
    colors = _colors(result["names"])
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


def _section(
    result: Mapping[str, Any],
    entry: Mapping[str, Any],
    query: str,
    title: str,
    keys: Sequence[str],
    points: Sequence[tuple[str, bool]],
    curves: Sequence[Markup],
) -> dict[str, Any]:
    rows, difference_keys = [], [key for key in keys if key in (*MEAN_STATISTICS, DEPENDENCY)]
    for name in result["names"]:
        overall, difference = entry["overall"][name], entry["difference"].get(name)
        rows.append(
            {
                "name": name,
                "color": _colors(result["names"])[name],
                "num_samples": entry["num_samples"][name],
                "band": band_text(overall["vas"]) if "vas" in keys else None,
                "cells": {key: cell(overall[key], DIGITS.get(key, 2)) for key in keys},
                "shared": None if difference is None else difference["num_samples"],
                "difference": None
                if difference is None
                else {key: cell(difference[key], DIGITS.get(key, 2)) for key in difference_keys},
            }
        )
    return {
        "name": query,
        "title": title,
        "labels": {key: LABELS[key] for key in keys},
        "difference_labels": {key: LABELS[key] for key in difference_keys},
        "has_band": "vas" in keys,
        "rows": rows,
        "unpaired": [name for name, part in entry["difference"].items() if part is None],
        "points": point_figures(result, entry, query, points),
        "curves": curves,
        "scatter": scatter_figures(result, entry, query),
        "correlations": correlation_rows(entry),
    }


def query_section(result: Mapping[str, Any], measurements: Sequence[Measurement], query: str) -> dict[str, Any]:
    entry, curves = result["queries"][query], curve_figures(measurements, query)
    return _section(result, entry, query, f"Attention of {query} tokens", STATISTICS, POINTS, curves)


def dependency_section(result: Mapping[str, Any], measurements: Sequence[Measurement]) -> dict[str, Any]:
    entry, colors = result["dependency"], _colors(result["names"])
    parts = [(one.name, one.summary["dependency"]) for one in measurements]
    curves = [figure for figure in position_figures(parts, ((DEPENDENCY, False),), colors) if figure is not None]
    title = f"Visual dependency of responses, nats per token, against {CORRUPTED[entry['corruption']]}"
    return _section(result, entry, DEPENDENCY, title, (DEPENDENCY,), ((DEPENDENCY, False),), curves)


def write_compare_report(path: Path, result: Mapping[str, Any], measurements: Sequence[Measurement]) -> None:
    """Write the report of the content of `compare.json`."""
    sections = [query_section(result, measurements, query) for query in result["queries"]]
    if result["dependency"] is not None:
        sections.append(dependency_section(result, measurements))
    text = page(
        "vas/compare.html.j2",
        names=result["names"],
        sources=list(zip(result["names"], result["models"], result["data"], strict=True)),
        sections=sections,
        uncompared=uncompared_text(result["uncompared"]) if result["uncompared"] else None,
        scores=result["scores"],
        num_draws=result["bootstrap"]["draws"],
    )
    path.write_text(text, encoding="utf-8")
