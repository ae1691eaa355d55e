# SPDX-License-Identifier: Apache-2.0
"""What `avar eval` prints: results, prompts, comparisons and the paper's ablation table."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from avar_verl.tools.evaluate.benchmarks import NAMES, PARTS
from avar_verl.tools.evaluate.run import summarize
from avar_verl.tools.records import Record
from avar_verl.tools.stats import Comparison
from avar_verl.tools.text import numbers_table

STAGES = ("base", "+VARD", "+AGTO", "+VARS")
# arXiv 2603.03825, Qwen2.5-VL-7B. Mean over the seven benchmarks in per cent, and VAS. Single benchmarks are published
# only for the first and the last stage.
PAPER_MEAN = (49.1, 51.0, 52.6, 56.1)
PAPER_VAS = (7.5, 10.1, 13.8, 18.9)
PAPER_BENCHMARKS = {
    "base": dict(zip(NAMES, (68.2, 25.2, 41.1, 58.1, 38.3, 62.1, 50.7), strict=True)),
    "+VARS": dict(zip(NAMES, (74.7, 37.4, 50.4, 63.8, 42.9, 64.1, 59.5), strict=True)),
}


def benchmark_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores by task, with the parts of a benchmark (MMMU-Pro) replaced by their mean, in the order of `NAMES`.

    >>> benchmark_scores({"mmmu_pro_standard": 0.4, "mmmu_pro_vision": 0.2, "mmstar": 0.5})
    {'mmmu_pro': 0.30000000000000004, 'mmstar': 0.5}

    Raises:
        ValueError: only some parts of a benchmark.
    """
    out = dict(scores)
    for name, parts in PARTS.items():
        found = [part for part in parts if part in scores]
        if found and len(found) < len(parts):
            raise ValueError(f"{name} is the mean of {parts}; got only {found}. Run --tasks {name}.")
        if found:
            out[name] = sum(out.pop(part) for part in parts) / len(parts)
    order = {name: number for number, name in enumerate(NAMES)}
    return {name: out[name] for name in sorted(out, key=lambda name: (order.get(name, len(order)), name))}


def check_same_questions(a: Mapping[str, Mapping[str, Record]], b: Mapping[str, Mapping[str, Record]]) -> None:
    """Check that the items shared by two runs are the same questions.

    Raises:
        ValueError: an item with one id but two prompts (different data, revision or prompt).
    """
    for task in a.keys() & b.keys():
        for i in a[task].keys() & b[task].keys():
            if a[task][i].prompt_hash != b[task][i].prompt_hash:
                raise ValueError(
                    f"runs are compared on the same questions; got two for item {i!r} of {task}. Ask both of the same "
                    "data, at one revision, with one prompt."
                )


def _percent(value: float, signed: bool = False) -> str:
    return f"{100 * value:{'+' if signed else ''}.1f}"


def results_table(results: Mapping[str, Any]) -> Table:
    """One row per task."""
    columns = ("task", "items", "accuracy %", "s.e.", "score %", "no answer", "cut off", "tokens")
    table = numbers_table(f"{results['model']}{'  ' + results['intervene'] if results['intervene'] else ''}", columns)
    for name, row in results["tasks"].items():
        table.add_row(
            name,
            str(row["n"]),
            _percent(row["accuracy"]),
            _percent(row["standard_error"]),
            _percent(row["score"]),
            str(row["no_answer"]),
            str(row["cut_off"]),
            f"{row['response_tokens']:.0f}",
        )
    return table


def comparison_table(name_a: str, name_b: str, comparisons: Mapping[str, Comparison]) -> Table:
    """One row per task, and one for the mean over several."""
    columns = ("task", "items", "A %", "B %", "B - A", "interval", "only A right", "only B right", "McNemar p")
    title = f"{name_b} against {name_a}, on the same items"
    table = numbers_table(title, columns, caption="95 % interval by paired bootstrap")
    for task, row in comparisons.items():
        table.add_row(
            task,
            str(row.n),
            _percent(row.accuracy_a),
            _percent(row.accuracy_b),
            _percent(row.difference, signed=True),
            f"{_percent(row.low, signed=True)} to {_percent(row.high, signed=True)}",
            str(row.only_a),
            str(row.only_b),
            f"{row.p_value:.3g}",
        )
    return table


def read_vas(path: Path, query: str = "user") -> float:
    """VAS over `query` tokens in the vas.json of `avar vas`, where non-finite numbers are text.

    Raises:
        ValueError: a missing file, or one without VAS for this query.
    """
    if not path.is_file():
        raise ValueError(f"--vas must name files that avar vas has written; got no file {path}. Check the path.")
    queries = json.loads(path.read_text()).get("queries", {})
    if query not in queries:
        raise ValueError(f"{path} must hold VAS of {query} tokens; got {sorted(queries)}. Measure it with avar vas.")
    return float(queries[query]["overall"]["vas"]["value"])


def ablation_rows(
    runs: Sequence[Mapping[str, Mapping[str, Record]]], vas: Sequence[float | None]
) -> list[dict[str, Any]]:
    """The paper's ablation, measured and published, one dict per stage.

    Raises:
        ValueError: not four runs, or runs with different tasks or numbers of items.
    """
    if len(runs) != len(STAGES) or len(vas) != len(STAGES):
        raise ValueError(
            f"the ablation has the stages {STAGES}; got {len(runs)} runs, {len(vas)} VAS. Name four folders."
        )
    sizes = [{task: len(records) for task, records in run.items()} for run in runs]
    for stage, size in zip(STAGES[1:], sizes[1:], strict=True):
        if size != sizes[0]:
            raise ValueError(
                f"stages are compared on the same items; got {size} of {stage}, {sizes[0]} of base. Finish all."
            )
    rows = []
    for number, stage in enumerate(STAGES):
        summaries = {task: summarize(list(records.values())) for task, records in runs[number].items()}
        scores = benchmark_scores({task: summary["score"] for task, summary in summaries.items()})
        rows.append(
            {
                "stage": stage,
                "scores": scores,
                "mean": sum(scores.values()) / len(scores),
                "n": sum(sizes[number].values()),
                "vas": vas[number],
                "paper_scores": PAPER_BENCHMARKS.get(stage, {}),
                "paper_mean": PAPER_MEAN[number],
                "paper_vas": PAPER_VAS[number],
            }
        )
    return rows


def ablation_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row per stage: measured, with the paper's number in brackets if there is one."""
    names = list(rows[0]["scores"])
    whole = set(names) == set(NAMES)
    caption = "The paper's mean is over its seven benchmarks; the measured one is over these tasks."
    columns = ("stage", *names, "mean %", "step", "VAS")
    table = numbers_table("Ablation: measured (paper)", columns, caption=None if whole else caption)

    def cell(measured: str, paper: float | None) -> str:
        return measured if paper is None else f"{measured} ({paper:.1f})"

    for number, row in enumerate(rows):
        step = _percent(row["mean"] - rows[number - 1]["mean"], signed=True) if number else ""
        paper_step = f"{row['paper_mean'] - rows[number - 1]['paper_mean']:+.1f}" if number else ""
        vas = "-" if row["vas"] is None else f"{row['vas']:.1f}" if math.isfinite(row["vas"]) else str(row["vas"])
        table.add_row(
            row["stage"],
            *(cell(_percent(row["scores"][name]), row["paper_scores"].get(name)) for name in names),
            cell(_percent(row["mean"]), row["paper_mean"]),
            f"{step} ({paper_step})" if number else "",
            cell(vas, row["paper_vas"]),
        )
    return table
