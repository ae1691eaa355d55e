# SPDX-License-Identifier: Apache-2.0
"""A grid of interventions on the same questions: accuracy of each, compared with no intervention, with significance.

Every cell of the grid is a folder of records (`avar_verl.tools.records`), written answer by answer, so a killed sweep
can continue and a grid can be extended later. `run_sweep` asks, `cell_results` compares, and the rest displays.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from avar_verl.intervention.spec import InterventionSpec
from avar_verl.tools.questions import Question
from avar_verl.tools.records import Record, Records
from avar_verl.tools.runs import write_json
from avar_verl.tools.stats import Comparison, compare, holm
from avar_verl.tools.text import numbers_table

LEVEL = 0.05
TASK = "sweep"
# `ask(items, spec)` yields a record for every item as soon as it is answered, in any order.
Ask = Callable[[Sequence[Question], InterventionSpec], Iterator[Record]]


def grid(
    alphas_img: Sequence[float],
    alphas_sys: Sequence[float],
    layers: tuple[int, ...] | None = None,
    heads: tuple[int, ...] | None = None,
) -> list[InterventionSpec]:
    """Every pair of alphas, starting with no intervention.

    Raises:
        ValueError: a repeated alpha, or a grid without (0, 0), which is the baseline.
    """
    for name, alphas in (("alpha_img", alphas_img), ("alpha_sys", alphas_sys)):
        if len(set(alphas)) != len(alphas) or 0 not in alphas:
            raise ValueError(
                f"values of {name} must differ, and 0 must be among them, with which the others are compared; got "
                f"{list(alphas)}. Change --{name.replace('_', '-')}."
            )
    cells = [InterventionSpec(img, sys, layers, heads) for sys in sorted(alphas_sys) for img in sorted(alphas_img)]
    return sorted(cells, key=lambda spec: not spec.is_identity)


def cell_folder(out: Path, spec: InterventionSpec) -> Path:
    """Path of the records of a cell; no intervention is the same for all layers."""
    return out / (str(InterventionSpec()) if spec.is_identity else str(spec))


def run_sweep(
    cells: Sequence[InterventionSpec],
    items: Sequence[Question],
    ask: Ask,
    out: Path,
    settings: dict[str, Any],
    progress: Callable[[InterventionSpec, int], None] = lambda spec, done: None,
) -> dict[InterventionSpec, dict[str, bool]]:
    """Ask all unanswered questions of every cell.

    Args:
        settings: everything else that could change an answer or its grade; stored with the records.
        progress: called with the number of answers of a cell so far.

    Returns:
        For every cell, whether each item (by id) is right.

    Raises:
        ValueError: `out` holds answers of other settings, or of other questions under the same id.
    """
    correct = {}
    for spec in cells:
        name = cell_folder(out, spec).name
        with Records(cell_folder(out, spec), {**settings, "intervene": name}) as file:
            for item in items:
                file.check_question(item)
            ids = {item.id for item in items}
            progress(spec, len(ids & file.records.keys()))
            for record in ask([item for item in items if item.id not in file.records], spec):
                file.add(record)
                progress(spec, len(ids & file.records.keys()))
            correct[spec] = {item.id: file.records[item.id].correct for item in items}
    return correct


@dataclass(frozen=True)
class CellResult:
    """One cell compared with no intervention.

    comparison: B is the cell; difference of accuracies with a paired bootstrap interval, and McNemar's exact p.
    adjusted_p: that p, adjusted by Holm over the cells of the grid.
    """

    spec: InterventionSpec
    comparison: Comparison
    adjusted_p: float

    @property
    def is_significant(self) -> bool:
        return self.adjusted_p < LEVEL

    def as_dict(self) -> dict[str, Any]:
        fields = {"alpha_img": self.spec.alpha_img, "alpha_sys": self.spec.alpha_sys, "intervene": str(self.spec)}
        return {**fields, **asdict(self.comparison), "adjusted_p": self.adjusted_p}


def cell_results(correct: dict[InterventionSpec, dict[str, bool]]) -> list[CellResult]:
    """Every cell except the first (no intervention), compared with the first."""
    (nothing, baseline), *others = correct.items()
    assert nothing.is_identity
    comparisons = [compare({TASK: baseline}, {TASK: cell})[TASK] for _, cell in others]
    adjusted = holm([comparison.p_value for comparison in comparisons])
    return [CellResult(spec, *rest) for (spec, _), *rest in zip(others, comparisons, adjusted, strict=True)]


def results_table(results: Sequence[CellResult]) -> Table:
    """The grid as a table, starting with no intervention."""
    first = results[0].comparison
    table = numbers_table(
        f"{first.n} questions; no intervention: {100 * first.accuracy_a:.1f} %",
        ("alpha_img", "alpha_sys", "accuracy", "difference", "interval", "won", "lost", "p", "adjusted p"),
        caption="difference in points with a 95 % interval (paired bootstrap); p: McNemar, adjusted by Holm",
    )
    for result in results:
        c = result.comparison
        table.add_row(
            f"{result.spec.alpha_img:g}",
            f"{result.spec.alpha_sys:g}",
            f"{100 * c.accuracy_b:.1f} %",
            f"{100 * c.difference:+.1f}",
            f"{100 * c.low:+.1f} to {100 * c.high:+.1f}",
            str(c.only_b),
            str(c.only_a),
            f"{c.p_value:.3g}",
            f"{result.adjusted_p:.3g}" + (" *" if result.is_significant else ""),
        )
    return table


def write_results(results: Sequence[CellResult], settings: dict[str, Any], out: Path) -> None:
    """`sweep.json` and `sweep.png` in the folder `out`."""
    write_json(out / "sweep.json", {"settings": settings, "cells": [result.as_dict() for result in results]})
    plot(results, out / "sweep.png")


def plot(results: Sequence[CellResult], path: Path) -> None:
    """Accuracy by alpha_img and alpha_sys, coloured by the difference from no intervention; `*` if significant."""
    from avar_verl.tools.figures import MAP, drawing, save_png  # Takes a second to import.

    first = results[0].comparison
    imgs = sorted({0.0, *(result.spec.alpha_img for result in results)})
    syss = sorted({0.0, *(result.spec.alpha_sys for result in results)})
    points = [[float("nan")] * len(imgs) for _ in syss]
    labels = [[""] * len(imgs) for _ in syss]
    row, column = syss.index(0.0), imgs.index(0.0)
    points[row][column], labels[row][column] = 0.0, f"{100 * first.accuracy_a:.1f}"
    for result in results:
        row, column = syss.index(result.spec.alpha_sys), imgs.index(result.spec.alpha_img)
        points[row][column] = 100 * result.comparison.difference
        labels[row][column] = f"{100 * result.comparison.accuracy_b:.1f}" + ("*" if result.is_significant else "")
    limit = max(1.0, *(abs(value) for line in points for value in line))
    with drawing(1.6 + 0.9 * len(imgs), 1.6 + 0.6 * len(syss), **MAP) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        image = axes.imshow(points, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
        for at, line in enumerate(labels):
            for where, label in enumerate(line):
                dark = abs(points[at][where]) > 0.6 * limit
                axes.text(where, at, label, ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(imgs)), [f"{alpha:g}" for alpha in imgs])
        axes.set_yticks(range(len(syss)), [f"{alpha:g}" for alpha in syss])
        axes.set_xlabel("alpha_img")
        axes.set_ylabel("alpha_sys")
        axes.set_title(f"accuracy in %, {first.n} questions")
        figure.colorbar(image, label="points against (0, 0)")
        save_png(figure, path)
