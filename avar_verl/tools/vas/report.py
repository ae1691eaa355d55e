# SPDX-License-Identifier: Apache-2.0
"""The report of a measurement, a self-contained HTML file, from `vas.json` and `words.json`."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup, escape

from avar_verl.objectives.dependency import CLAMP
from avar_verl.objectives.vas import BANDS, STATISTICS, band
from avar_verl.tools.figures import BLUE, GREEN, VERMILION, Line, curves_figure, heat_figure
from avar_verl.tools.report import data_uri, decode_image, duration_text, number_text, numbers, overlay, page, printable
from avar_verl.tools.vas.score import DEPENDENCY
from avar_verl.tools.vas.show import CORRUPTED
from avar_verl.tools.vas.words import raster

QUERY_COLORS = {"user": BLUE, "response": VERMILION}
LABELS = {
    "vas": "VAS",
    "vas_median": "VAS, median head",
    "ratio_of_means": "ratio of means",
    "log_ratio": "log ratio",
    "image_share": "image share",
    "image_mass": "image mass",
    "system_mass": "system mass",
    DEPENDENCY: "dependency",
}
SETTINGS = (
    *("model", "data", "split", "columns", "queries", "layers", "max_new_tokens", "system", "dtype", "device"),
    *("corruption", "num_rows", "bootstrap"),
)
# Colours of words by dependency: more, or less, likely with the image. The clip is opaque.
WORD_RGB = {True: "213, 94, 0", False: "0, 114, 178"}
WORD_OPACITY = 0.7
DIGITS = {DEPENDENCY: 3, "log_ratio": 3, "image_share": 3, "image_mass": 3, "system_mass": 3, "mass_per_token": 5}


def estimate_text(part: Mapping[str, Any], digits: int = 2) -> str:
    """`value [low, high]`, or only the value if there is no interval. The spaces in the interval do not break."""
    value, low, high = (float(numbers(part[key])) for key in ("value", "low", "high"))
    text = number_text(value, digits)
    return text if part["low"] is None else f"{text} [{number_text(low, digits)},\u00a0{number_text(high, digits)}]"


def cell(part: Mapping[str, Any], digits: int = 2) -> Markup:
    """`estimate_text` with the interval on its own line."""
    value, found, rest = estimate_text(part, digits).partition(" [")
    return escape(value) + (Markup("<small>[") + escape(rest) + Markup("</small>") if found else Markup())


def band_text(part: Mapping[str, Any]) -> str:
    """The paper's band of a VAS, and the bands that its interval reaches."""
    names = [band(float(numbers(part[key]))) for key in ("value", "low", "high")]
    if names[0] is None:
        return "none"
    reached = sorted({name for name in names if name}, key=[name for _, name in BANDS].index)
    return names[0] if len(reached) == 1 else f"{names[0]} ({' to '.join((reached[0], reached[-1]))})"


def summary_text(summary: Mapping[str, Any]) -> str:
    """The paragraph at the top, written from the numbers."""
    out = [f"{summary['name']} on {summary['num_rows']} samples of {Path(summary['data']).name}."]
    for name, query in summary["queries"].items():
        share = query["overall"]["image_share"]
        out.append(
            f"Of the attention that {name} tokens give to the image or the system turn, the image gets "
            f"{estimate_text(share, 3)}; VAS is {estimate_text(query['overall']['vas'])}"
            f"{'' if query['band'] is None else ', ' + query['band'] + ' by the bands of the paper'}."
        )
    heads = {name: numbers(query["heads"]["vas"]["value"]) for name, query in summary["queries"].items()}
    for name, vas_LH in heads.items():
        finite = vas_LH[(vas_LH > -math.inf) & (vas_LH < math.inf)]
        if finite.size > 1 and finite.sum() > 0 and finite.max() > finite.sum() / 2:
            out.append(
                f"One of the {vas_LH.size} heads makes up {100 * finite.max() / finite.sum():.0f}\u00a0% of the VAS of "
                f"{name} tokens: read the median head, the ratio of means and the image share instead."
            )
    if summary["dependency"] is not None:
        out.append(
            f"Visual dependency of responses: {estimate_text(summary['dependency']['overall'], 3)} nats per token more "
            f"likely with their image than with {CORRUPTED[summary['corruption']]}."
        )
    return " ".join(out)


def query_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of headline numbers, one row per query role."""
    rows = []
    for name, query in summary["queries"].items():
        cells = {key: cell(query["overall"][key], DIGITS.get(key, 2)) for key in STATISTICS}
        rows.append({"query": name, "band": band_text(query["overall"]["vas"]), **query, "cells": cells})
    return rows


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Notes: samples that were left out, and numbers to read with care."""
    out = []
    for name, query in summary["queries"].items():
        for reason, count in query["skipped"].items():
            out.append(f"{count} of {summary['num_rows']} samples have no VAS of {name} tokens: {reason}.")
        blind = query["num_queries_before_image"]
        if blind:
            out.append(
                f"{blind} of {query['num_queries']} {name} tokens are before the first image and cannot see it: "
                "their ratio and share are 0, as in the paper's definition."
            )
    if not out:
        out.append("No sample was left out.")
    return out


def dependency_section(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Visual dependency as a row of numbers, notes, and a curve over the position; None if it was not measured."""
    part = summary["dependency"]
    if part is None:
        return None
    positions = part["positions"]
    line = Line.of(LABELS[DEPENDENCY], GREEN, range(len(positions)), [one[DEPENDENCY] for one in positions])
    figure = curves_figure(
        "position-dependency", [line], "dependency (nats)", "token of the response", x_ticks=bin_ticks(positions)
    )
    return {
        **part,
        "cell": cell(part["overall"], DIGITS[DEPENDENCY]),
        "corrupted": CORRUPTED[summary["corruption"]],
        "notes": [
            f"{count} of {summary['num_rows']} samples have no dependency: {reason}."
            for reason, count in part["skipped"].items()
        ],
        "figures": [] if figure is None else [figure],
    }


def coloured(parts: Sequence[tuple[str, float | None]] | None) -> Markup:
    """The response as HTML, each part on the colour of its dependency, which the pointer shows in nats."""
    out = Markup()
    for text, value in parts or ():
        shown = escape(printable(text))
        if value is None:
            out += shown
            continue
        opacity = WORD_OPACITY * min(1.0, abs(value) / CLAMP)
        style = f"background: rgba({WORD_RGB[value >= 0]}, {opacity:.2f})"
        out += Markup('<span style="{}" title="{}">{}</span>').format(style, number_text(value, 2), shown)
    return out


def image_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per image position and query role, if samples have several images."""
    rows = []
    for name, query in summary["queries"].items():
        for index, part in enumerate(query["images"], start=1):
            cells = {
                key: estimate_text(part[key], DIGITS.get(key, 2)) for key in ("vas", "image_mass", "mass_per_token")
            }
            row = {"query": name, "image": index, "num_samples": part["num_samples"], "tokens": part["tokens"]}
            rows.append({**row, "cells": cells})
    return rows if any(row["image"] > 1 for row in rows) else []


def bin_ticks(positions: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Labels of the bins by their number: their first position; every other one if there are many."""
    step = 1 if len(positions) <= 8 else 2
    return {index: f"{one['first']:,}" for index, one in enumerate(positions) if index % step == 0}


def layer_figures(summary: Mapping[str, Any]) -> list[Markup]:
    figures = []
    for key, ratios in (("image_share", False), ("vas", True), ("vas_median", True)):
        lines = [
            Line.of(name, QUERY_COLORS[name], query["layers"]["layer"], query["layers"][key])
            for name, query in summary["queries"].items()
        ]
        figures.append(curves_figure(f"layer-{key}", lines, LABELS[key], "layer", ratios))
    return [figure for figure in figures if figure is not None]


def position_figures(positions: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Curves over the position in the response."""
    ticks, x, color = bin_ticks(positions), range(len(positions)), QUERY_COLORS["response"]
    figures = []
    for keys, label, ratios in (
        (("image_share",), "image share", False),
        (("image_mass", "system_mass"), "mass", False),
        (("vas", "ratio_of_means"), "image / system", True),
    ):
        lines = [
            Line.of(LABELS[key], line_color, x, [one[key] for one in positions])
            for key, line_color in zip(keys, (color, QUERY_COLORS["user"]), strict=False)
        ]
        figures.append(curves_figure(f"position-{keys[0]}", lines, label, "token of the response", ratios, ticks))
    return [figure for figure in figures if figure is not None]


def position_rows(positions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for one in positions:
        span = f"{one['first']:,} and on" if one["last"] is None else f"{one['first']:,} to {one['last']:,}"
        cells = {key: estimate_text(one[key], DIGITS.get(key, 2)) for key in ("image_share", "ratio_of_means", "vas")}
        rows.append({"span": span, "num_samples": one["num_samples"], "cells": cells})
    return rows


def heat_maps(summary: Mapping[str, Any]) -> Markup:
    maps = {
        f"{name} tokens": (query["heads"]["image_share"]["value"], query["heads"]["vas"]["value"])
        for name, query in summary["queries"].items()
    }
    return heat_figure("heat", "Attention", maps, summary["layers"])


def sample_rows(shown: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Shown samples: images, texts with the words marked, one overlay per word."""
    rows = []
    for sample in shown:
        images = [decode_image(image, f"sample {sample['row']}") for image in sample["images"]]
        words = []
        for word in sample["words"]:
            image = images[word["image"]]
            places = torch.tensor(sample["places"][word["image"]], dtype=torch.float64)
            density_YX = raster(places, torch.tensor(word["tokens_mass"]), image.size)
            words.append(
                {
                    "word": printable(word["word"]),
                    "overlay": data_uri(overlay(image, density_YX)),
                    "mass": number_text(word["mass"], 3),
                    "image": word["image"] + 1 if len(images) > 1 else None,
                }
            )
        rows.append(
            {
                "row": sample["row"],
                "question": printable(sample["question"]),
                "response": marked(printable(sample["response"]), [word["word"] for word in sample["words"]]),
                "images": [data_uri(image) for image in images],
                "words": words,
                "note": sample["note"],
                "coloured": coloured(sample["dependency"]),
            }
        )
    return rows


def marked(text: str, words: Sequence[str]) -> Markup:
    """The text as HTML, with the first occurrence of every word marked."""
    out, at = Markup(), 0
    for word in words:
        match = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)").search(text, at)
        if match:
            out += escape(text[at : match.start()]) + Markup("<mark>") + escape(word) + Markup("</mark>")
            at = match.end()
    return out + escape(text[at:])


def setting_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key in SETTINGS:
        value = summary[key]
        if value in (None, {}):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        rows.append((key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return [*rows, ("seconds", duration_text(summary["seconds"]))]


def write_report(path: Path, summary: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> None:
    """Write the report of the content of `vas.json` and `words.json`."""
    positions = summary["queries"].get("response", {}).get("positions", [])
    text = page(
        "vas/report.html.j2",
        title=f"{'VAS' if summary['queries'] else 'Visual dependency'} of {summary['name']}",
        summary=summary_text(summary),
        queries=query_rows(summary),
        labels={key: LABELS[key] for key in STATISTICS},
        notes=notes(summary),
        heat_svg=heat_maps(summary) if summary["queries"] else None,
        layer_svgs=layer_figures(summary) if summary["queries"] else [],
        position_svgs=position_figures(positions),
        position_rows=position_rows(positions),
        image_rows=image_rows(summary),
        dependency=dependency_section(summary),
        clamp=CLAMP,
        samples=sample_rows(shown),
        settings=setting_rows(summary),
        versions=summary["versions"],
    )
    path.write_text(text, encoding="utf-8")
