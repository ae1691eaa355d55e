# SPDX-License-Identifier: Apache-2.0
"""The demo's report: `report.json` with the numbers, `report.html`, a self-contained page, and `report.png`.

Reads the output of `avar_verl.tools.demo.run`: `stages/<name>.json` (measured on held-out samples), the metrics of
verl's file logger in `logs/<name>.jsonl`, and `settings.json` if it exists.

A non-finite number (VAS is a ratio, and its denominator can be zero in a head) is null in report.json and a word in
report.html; nothing is clipped or replaced.
"""

import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from avar_verl.objectives.vas import STATISTICS
from avar_verl.tools.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILION,
    Line,
    curves_figure,
    drawing,
    heat_figure,
    save_png,
    svg,
)
from avar_verl.tools.report import data_uri, decode_image, duration_text, number_text, overlay, page, printable
from avar_verl.tools.stats import standard_error, wilson

STAGES = ("base", "sft", "agto", "grpo", "avar")
STARTS_FROM = {"base": None, "sft": "base", "agto": "base", "grpo": "agto", "avar": "agto"}
# What the first figure shows of a stage, in [0, 1].
SHARES = {"accuracy": "unbiased hints", "accuracy_biased": "biased hints", "looks": "responses that look"}
QUERIES = ("response", "user")
BOUNDED_FIELDS = ("image_share", "image_mass", "system_mass")  # In [0, 1].
STAGE_KEYS = (
    *("name", "title", "seconds", "accuracy", "accuracy_biased", "looks", "n_eval", "chance"),
    *("vas", "heatmap", "samples", "guidance"),
)

STAGE_COLORS = {"base": GREY, "sft": BLUE, "agto": ORANGE, "grpo": VERMILION, "avar": GREEN}
LONG_RESPONSE = 160  # Characters; a longer text without a closed reasoning block is folded away.


# ---- reading ---------------------------------------------------------------------------------------------------


def _check(condition: bool, rule: str, got, fix: str) -> None:
    if not condition:
        raise ValueError(f"{rule}; got {got!r}. {fix}")


def read_stages(run_dir: Path) -> list[dict]:
    """The stages as the demo has measured them, in the order of `STAGES`.

    Raises:
        ValueError: no file of a stage, or one that another version wrote.
    """
    stages = []
    for name in STAGES:
        path = run_dir / "stages" / f"{name}.json"
        rule = f"the report needs every stage of {STAGES}"
        _check(path.is_file(), rule, f"no file {path}", "Run the demo to its end.")
        stage = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in STAGE_KEYS if key not in stage]
        fix = "Delete the file and run the demo again: it measures the stage anew."
        _check(not missing, f"{path} must hold the fields {STAGE_KEYS}", f"none of {missing}", fix)
        stages.append(stage)
    return stages


def read_log(path: Path, wanted: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric of `wanted` in a file of verl's file logger; a metric may be absent.

    Raises:
        ValueError: a line that is not `{"step": int, "data": {metric: number}}`, with its number.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            step, data = operator.itemgetter("step", "data")(json.loads(line))
            found = {key: (int(step), float(data[key])) for key in wanted if key in data}
        except (ValueError, KeyError, TypeError) as error:
            rule = f'{path.name} line {number} must be {{"step": number, "data": {{metric: number}}}}'
            raise ValueError(f"{rule}; got {line[:80]!r}. Delete the line, or run the stage again.") from error
        for key, point in found.items():
            curves.setdefault(key, []).append(point)
    return curves


# ---- words -----------------------------------------------------------------------------------------------------


def accuracy_text(accuracy: float, n: int) -> str:
    """Per cent with its standard error, with non-breaking spaces."""
    return f"{100 * accuracy:.1f} \u00b1 {100 * standard_error(accuracy, n):.1f} %".replace(" ", "\u00a0")


def compare(stage: dict, before: dict) -> str:
    """Comparison of the accuracies of two stages, as the end of a sentence.

    A difference counts as clear if it is at least two standard errors of the difference, assuming independence.
    """
    points = 100 * (stage["accuracy"] - before["accuracy"])
    if points == 0:
        return f"level with {before['title']}"
    errors = [standard_error(one["accuracy"], one["n_eval"]) for one in (stage, before)]
    clear = abs(points) >= 200 * math.hypot(*errors)
    word = f"{'better' if points > 0 else 'worse'} than {before['title']}"
    return f"clearly {word} ({points:+.1f} points)" if clear else f"{word}, but not clearly so ({points:+.1f} points)"


def summary_text(stages: Sequence[dict], seconds: float) -> str:
    """The paragraph at the top, written from the numbers."""
    by_name = {stage["name"]: stage for stage in stages}
    base, control, last = by_name["base"], by_name["grpo"], by_name["avar"]
    out = [
        "Each question asks what one place of an image shows, and adds a hint: what somebody says it shows. A lazy "
        "answer believes the hint, another one looks. "
        f"In {base['n_eval']} held-out questions the hint is right in 1 of 10, no more often than a guess "
        f"({100 * base['chance']:.1f}\u00a0%)."
    ]
    for stage in stages[1:]:
        reached = accuracy_text(stage["accuracy"], stage["n_eval"])
        looks = f"{100 * stage['looks']:.0f}\u00a0% of its responses look at the image"
        before = compare(stage, by_name[STARTS_FROM[stage["name"]]])
        out.append(f"{stage['title']} answers {reached} right, {before}; {looks}.")
    out.append(
        f"{control['title']} and {last['title']} differ in the visual reward alone: {last['title']} is "
        f"{compare(last, control)}."
    )
    out.append("Clear means at least two standard errors of the difference.")
    shares = ", ".join(f"{stage['title']} {number_text(_share(stage))}" for stage in stages)
    out.append(f"Of the attention that response tokens give to the image or the system turn, the image gets: {shares}.")
    out.append(
        f"The run took {duration_text(seconds)}. One seed and a tiny model: compare the stages with one another, not "
        "with published numbers."
    )
    return " ".join(out)


def _share(stage: dict) -> float:
    return stage["vas"]["response"]["image_share"]


def split_response(response: str) -> tuple[str, str, str]:
    """(reasoning, rest, note) of a response; `note` says what is odd about its reasoning block.

    >>> split_response("<think>A cat.</think><answer>cat</answer>")
    ('A cat.', '<answer>cat</answer>', '')
    """
    before, opening, after = response.partition("<think>")
    if not opening:
        return ("", response, "") if len(response) <= LONG_RESPONSE else (response, "", "no reasoning block")
    reasoning, closing, rest = after.partition("</think>")
    if not closing:
        return reasoning, before.strip(), "never closed"
    return reasoning.strip(), (before + rest).strip(), ""


# ---- figures ---------------------------------------------------------------------------------------------------


def draw_shares(axes, stages: Sequence[dict]) -> list[str]:
    """Bars of SHARES by stage, with Wilson's 95 % intervals; what they say in words."""
    width, alts = 0.8 / len(stages), []
    for index, stage in enumerate(stages):
        values = [stage[key] for key in SHARES]
        heights = [100 * value for value in values]
        ends = np.array([wilson(value, stage["n_eval"]) for value in values]).T * 100
        x = np.arange(len(SHARES)) + (index - (len(stages) - 1) / 2) * width
        axes.bar(x, heights, width * 0.92, color=STAGE_COLORS[stage["name"]], label=stage["title"])
        errors = np.abs(ends - np.array(heights))
        axes.errorbar(x, heights, errors, fmt="none", ecolor=BLACK, elinewidth=0.8, capsize=2)
        for at, height, end in zip(x, heights, ends[1], strict=True):
            axes.annotate(f"{height:.0f}", (at, end), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        alts.append(f"{stage['title']} " + ", ".join(f"{height:.0f}" for height in heights))
    axes.hlines(100 * stages[0]["chance"], -0.46, 0.46, BLACK, "dashed", linewidth=1, label="guessing")
    axes.set_xticks(range(len(SHARES)), list(SHARES.values()))
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("%")
    axes.grid(axis="x", visible=False)
    return alts


def shares_figure(stages: Sequence[dict]) -> Markup:
    """Right answers with unbiased and biased hints, and responses that look, one bar per stage."""
    with drawing(10.5, 3.4) as figure:
        axes = figure.subplots(gridspec_kw={"left": 0.05, "right": 0.995, "bottom": 0.1, "top": 0.9})
        alts = draw_shares(axes, stages)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(stages) + 1)
        what = "Right answers with unbiased and biased hints, and responses that look, in per cent of"
        return svg(figure, "shares", f"{what} {stages[0]['n_eval']}: {'; '.join(alts)}.")


@dataclass(frozen=True)
class Curve:
    """One metric of one log: `stage` names the file. `label` may hold stages' titles: `{sft} image`."""

    stage: str
    key: str
    label: str
    color: str
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """One plot of training curves; `about` is its caption."""

    title: str
    about: str
    curves: tuple[Curve, ...]
    log_scale: bool = False


def _curves(stages: Sequence[str], key: str, suffix: str = "", style: str = "-") -> tuple[Curve, ...]:
    return tuple(Curve(stage, key, f"{{{stage}}}{suffix}", STAGE_COLORS[stage], style) for stage in stages)


def _both_cold_starts(key: str, suffix: str = "", style: str = "-") -> tuple[Curve, ...]:
    return _curves(("sft", "agto"), key, suffix, style)


COLD_START_PANELS = (
    Panel(
        "Language-model loss",
        "Cross entropy of the reference responses, without guidance terms.",
        _both_cold_starts("avar/lm_loss"),
    ),
    Panel("Total training loss", "What the optimizer sees: guidance included.", _both_cold_starts("train/loss")),
    Panel("Validation loss", "verl's val/loss.", _both_cold_starts("val/loss")),
    Panel(
        "Attention masses",
        "Share of all attention, mean over layers, heads and query tokens.",
        (*_both_cold_starts("avar/image_mass", " image"), *_both_cold_starts("avar/system_mass", " system", "--")),
    ),
    Panel("Image share", "Image mass / (image mass + system mass).", _both_cold_starts("avar/image_share")),
    Panel(
        "AGTO terms",
        "Before alpha and beta. Plain SFT only measures them.",
        (*_both_cold_starts("avar/enhance", " enhance"), *_both_cold_starts("avar/suppress", " suppress", "--")),
    ),
    Panel(
        "VAS of the training batches",
        "Mean ratio as in the paper; single heads dominate it.",
        _both_cold_starts("avar/vas"),
        log_scale=True,
    ),
)


def _of_rollouts(title: str, about: str, key: str, log_scale: bool = False) -> Panel:
    return Panel(title, about, _curves(("grpo", "avar"), key), log_scale)


GRPO_PANELS = (
    _of_rollouts("Responses that look", "Share of rollouts, not paid.", "avar/reward/looks"),
    _of_rollouts("Accuracy", "Of the rollouts; the hints of the prompts are always right.", "avar/reward/acc"),
    _of_rollouts("Visual dependency", "Of response tokens on the image, in nats.", "avar/dependency"),
    _of_rollouts("Response length", "Tokens, mean over rollouts.", "response_length/mean"),
    Panel(
        "Visual reward",
        "Raw, after gate and shaping, after lambda_v.",
        (
            Curve("avar", "avar/r_visual/raw", "raw", SKY),
            Curve("avar", "avar/r_visual/gated", "gated", BLUE),
            Curve("avar", "avar/r_visual/weighted", "weighted", VERMILION, "--"),
        ),
    ),
    _of_rollouts("Image share", "Of the rollouts' response tokens.", "avar/image_share"),
    _of_rollouts("VAS of the rollouts", "Mean ratio as in the paper.", "avar/vas", log_scale=True),
    _of_rollouts(
        "Rollout and actor agree",
        "Correlation of the probabilities of vLLM and of the actor.",
        "training/rollout_actor_probs_pearson_corr",
    ),
    _of_rollouts("Time of a step", "Seconds.", "timing_s/step"),
)
Logs = Mapping[str, dict[str, list[tuple[int, float]]]]


def panels_with_notes(
    panels: Sequence[Panel], logs: Logs, titles: Mapping[str, str], prefix: str
) -> tuple[list[dict], list[str]]:
    """The panels that have a curve, as `{"title", "about", "svg"}`, and a sentence for all that is missing.

    `titles` are the stages' titles by name; `prefix` keeps the figures of two calls apart.
    """
    drawn, notes = [], []
    for index, panel in enumerate(panels):
        found = []
        for curve in panel.curves:
            points = logs[curve.stage].get(curve.key, [])
            finite = [value for _, value in points if math.isfinite(value)]
            if finite:
                found.append((curve, points))
            if 0 < len(finite) < len(points):
                notes.append(
                    f"{panel.title}: {len(points) - len(finite)} of {len(points)} values of {curve.key} in "
                    f"logs/{curve.stage}.jsonl are not finite and leave a gap."
                )
        absent = [f"{c.key} in logs/{c.stage}.jsonl" for c in panel.curves if not any(c is one for one, _ in found)]
        if absent:
            what = "left out" if not found else "drawn without a curve"
            notes.append(f"{panel.title}: {what}, no finite value of {' or '.join(absent)}.")
        if found:
            figure = _curve_figure(panel, found, titles, f"{prefix}{index}")
            drawn.append({"title": panel.title, "about": panel.about, "svg": figure})
    return drawn, notes


def _curve_figure(
    panel: Panel, found: Sequence[tuple[Curve, list[tuple[int, float]]]], titles: Mapping[str, str], name: str
) -> Markup:
    lines = [
        Line(curve.label.format(**titles), curve.color, *np.array(points, dtype=float).T, style=curve.style)
        for curve, points in found
    ]
    return curves_figure(name, lines, "", "step", panel.log_scale, what=panel.title)


def heatmap_figure(stages: Sequence[dict], query: str) -> Markup:
    """Layer by head maps, a column per stage."""
    maps = {stage["title"]: tuple(stage["heatmap"][query][key] for key in ("share", "ratio")) for stage in stages}
    layers = range(len(stages[0]["heatmap"][query]["share"]))
    return heat_figure(f"heat-{query}", f"Attention of {query} tokens", maps, layers)


def picture(stages: Sequence[dict]) -> Figure:
    """report.png: right answers and looks by stage, and below it where each stage looks as it writes one answer.

    The question is the first that the last stage answers correctly and the fewest others.
    """
    samples = [stage["samples"] for stage in stages]
    counts = [sum(of_stage[index]["correct"] for of_stage in samples[:-1]) for index in range(len(samples[0]))]
    index = min(range(len(counts)), key=lambda one: (not samples[-1][one]["correct"], counts[one]))
    shown = [of_stage[index] for of_stage in samples]
    image = decode_image(shown[0]["image"], "the sample of report.png")
    with drawing(9, 5.6) as figure:
        axes = figure.subplots(gridspec_kw={"left": 0.06, "right": 0.99, "bottom": 0.52, "top": 0.93})
        draw_shares(axes, stages)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(stages) + 1)
        figure.text(0.5, 0.4, f"\u201c{printable(shown[0]['question'])}\u201d", ha="center", fontsize=11)
        cells = figure.subplots(
            1, len(stages) + 1, gridspec_kw={"left": 0.02, "right": 0.98, "bottom": 0.02, "top": 0.3}
        )
        cells[0].set_title("the image")
        cells[0].imshow(image)
        for axes, stage, sample in zip(cells[1:], stages, shown, strict=True):
            attention = sample["attention"]
            axes.imshow(image.convert("L").convert("RGB") if attention is None else overlay(image, attention))
            answer = printable(sample["predicted"] or "")
            axes.set_title(f"{stage['title']}\n" + (f"\u201c{answer}\u201d" if answer else "no answer"))
        for axes in cells:
            axes.set_axis_off()
    return figure


# ---- the page --------------------------------------------------------------------------------------------------


def stage_rows(stages: Sequence[dict]) -> list[dict]:
    """The table of stages, a group of rows per stage: one for response and one for user queries."""
    titles = {stage["name"]: stage["title"] for stage in stages}
    rows = []
    for stage in stages:
        parts = []
        for query in QUERIES:
            summary = stage["vas"][query]
            cells = {key: number_text(float(summary[key]), 3 if key in BOUNDED_FIELDS else 2) for key in STATISTICS}
            parts.append({"query": query, **cells})
        rows.append(
            {
                "title": stage["title"],
                "color": STAGE_COLORS[stage["name"]],
                "starts_from": titles.get(STARTS_FROM[stage["name"]], "random weights"),
                "accuracy": accuracy_text(stage["accuracy"], stage["n_eval"]),
                "accuracy_biased": accuracy_text(stage["accuracy_biased"], stage["n_eval"]),
                "looks": f"{100 * stage['looks']:.1f} %",
                "seconds": duration_text(stage["seconds"]),
                "parts": parts,
            }
        )
    return rows


def skipped_note(stages: Sequence[dict]) -> str:
    """A sentence on samples for which VAS is not defined; empty where there is none."""
    counts = [
        f"{part['num_skipped']} of {part['num_skipped'] + part['num_samples']} ({stage['title']}, {query} tokens)"
        for stage in stages
        for query in QUERIES
        if (part := stage["vas"][query]).get("num_skipped")
    ]
    text = f"Samples without an image or a system turn have no VAS and are skipped: {', '.join(counts)}."
    return text if counts else ""


def sample_rows(stages: Sequence[dict]) -> list[dict]:
    """The sample rollouts: a row per question, in it a cell per stage."""
    rows = []
    for index, first in enumerate(stages[0]["samples"]):
        image = decode_image(first["image"], f"sample {index} of {stages[0]['name']}")
        cells = [_sample_cell(stage, stage["samples"][index], image) for stage in stages]
        texts = {key: printable(first[key]) for key in ("question", "answer")}
        rows.append({"image": data_uri(image), **texts, "cells": cells})
    return rows


def _sample_cell(stage: dict, sample: dict, image: Image.Image) -> dict:
    attention = sample["attention"]
    reasoning, rest, note = split_response(printable(sample["response"]))
    return {
        "title": stage["title"],
        "overlay": None if attention is None else data_uri(overlay(image, attention)),
        "mass": "" if attention is None else number_text(float(np.sum(attention))),
        "tokens": printable(sample["answer_tokens"] or ""),
        "reasoning": reasoning,
        "rest": rest,
        "note": note,
        "words": len(reasoning.split()),
        "predicted": printable(sample["predicted"] or "") or None,
        "correct": bool(sample["correct"]),
    }


def setting_rows(run_dir: Path, stages: Sequence[dict]) -> list[tuple[str, str, str]]:
    """(where, name, value) of `settings.json` and of the guidance of every stage."""
    path, rows = run_dir / "settings.json", []
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        rows += [("demo", key, value) for key, value in settings.items() if not isinstance(value, dict)]
    for stage in stages:
        rows += [(stage["title"], key, value) for key, value in (stage["guidance"] or {}).items()]
    return [(where, key, value if isinstance(value, str) else json.dumps(value)) for where, key, value in rows]


def finite_or_none(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return float(value) if math.isfinite(value) else None


def report_dict(stages: Sequence[dict], seconds: float, versions: Mapping[str, str]) -> dict:
    """What report.json holds."""
    rows = []
    for stage in stages:
        user, response = stage["vas"]["user"], stage["vas"]["response"]
        rows.append(
            {
                "name": stage["name"],
                "vas_user": finite_or_none(user["vas"]),
                "vas_response": finite_or_none(response["vas"]),
                "image_share_response": finite_or_none(response["image_share"]),
                "accuracy": float(stage["accuracy"]),
                "accuracy_biased": float(stage["accuracy_biased"]),
                "looks": float(stage["looks"]),
                "n_eval": stage["n_eval"],
                "accuracy_standard_error": standard_error(stage["accuracy"], stage["n_eval"]),
                "image_share_user": finite_or_none(user["image_share"]),
                "ratio_of_means_user": finite_or_none(user["ratio_of_means"]),
                "ratio_of_means_response": finite_or_none(response["ratio_of_means"]),
                "seconds": float(stage["seconds"]),
            }
        )
    return {
        "seconds": float(seconds),
        "chance": float(stages[0]["chance"]),
        "stages": rows,
        "versions": dict(versions),
    }


def _read_logs(run_dir: Path) -> tuple[Logs, list[str]]:
    logs, notes = {}, []
    for name in STAGES[1:]:
        path = run_dir / "logs" / f"{name}.jsonl"
        panels = (*COLD_START_PANELS, *GRPO_PANELS)
        wanted = sorted({curve.key for panel in panels for curve in panel.curves if curve.stage == name})
        logs[name] = read_log(path, wanted) if path.is_file() else {}
        if not path.is_file():
            notes.append(f"logs/{name}.jsonl does not exist.")
    return logs, notes


def report_page(run_dir: Path, stages: Sequence[dict], seconds: float, versions: Mapping[str, str]) -> str:
    """report.html."""
    logs, notes = _read_logs(run_dir)
    titles = {stage["name"]: stage["title"] for stage in stages}
    cold_start, cold_start_notes = panels_with_notes(COLD_START_PANELS, logs, titles, "cold")
    grpo, grpo_notes = panels_with_notes(GRPO_PANELS, logs, titles, "grpo")
    return page(
        "demo/report.html.j2",
        summary=summary_text(stages, seconds),
        stage_rows=stage_rows(stages),
        skipped=skipped_note(stages),
        shares_svg=shares_figure(stages),
        cold_start=cold_start,
        grpo=grpo,
        curve_notes=notes + cold_start_notes + grpo_notes,
        heatmaps=[(query, heatmap_figure(stages, query)) for query in QUERIES],
        titles=titles,
        sample_rows=sample_rows(stages),
        versions=versions,
        settings=setting_rows(run_dir, stages),
    )


def write_report(run_dir: Path, seconds: float, versions: dict[str, str]) -> dict:
    """Write `report.html`, `report.png` and `report.json` into `run_dir`; returns what report.json holds.

    Args:
        run_dir: folder with `stages/` and `logs/`.
        seconds: of the whole run, >= 0.
        versions: package name to version, shown as it is.

    Raises:
        ValueError: a stage is missing or damaged, a log has an unreadable line, or `seconds` cannot be right.
    """
    ok = isinstance(seconds, Real) and math.isfinite(seconds) and seconds >= 0
    _check(ok, "seconds must be finite and not negative", seconds, "Pass the seconds that the run took.")
    stages = read_stages(run_dir)
    report = report_dict(stages, seconds, versions)
    save_png(picture(stages), run_dir / "report.png")
    (run_dir / "report.html").write_text(report_page(run_dir, stages, seconds, versions), encoding="utf-8")
    (run_dir / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return report
