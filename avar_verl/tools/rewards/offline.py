# SPDX-License-Identifier: Apache-2.0
"""Score recorded rollouts, to try a reward before spending GPU time. No verl import.

Reads the files that verl writes with `trainer.rollout_data_dir` (jsonl with `output` and `gts`), and any jsonl or
parquet file with a column of responses and one of ground truths.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from avar_verl.anchors import parse_anchors
from avar_verl.data.rows import Paths, Row, read_rows
from avar_verl.rewards.compose import load_function
from avar_verl.tools.progress import progress
from avar_verl.tools.rewards.command import Score
from avar_verl.tools.text import highlighted, histogram, numbers_table

SHIPPED = ("avar", "accuracy", "format", "visual_anchor", "grounding_iou", "compose")
RESPONSES = ("response", "output", "solution_str", "completion")
GROUND_TRUTHS = ("ground_truth", "gts", "answer")
HISTOGRAM_WIDTH = 40


def load_reward(name: str) -> Callable[..., dict]:
    """`compute_score` of a shipped reward, of a file, or of `pkg://package.module`.

    Raises:
        ValueError: not a shipped name, and not loadable.
    """
    if name in SHIPPED:
        name = f"pkg://reward_fns.{name}"
    elif not name.startswith("pkg://") and not Path(name).is_file():
        raise ValueError(f"a reward is one of {list(SHIPPED)}, a file or pkg://module; got {name!r}. Name one.")
    return load_function(f"{name}:compute_score")


def _column(row: Row, names: Iterable[str], what: str) -> Any:
    for name in names:
        if row.values.get(name) is not None:
            return row.values[name]
    if what == "ground truth" and isinstance(row.values.get("reward_model"), dict):
        return row.values["reward_model"].get("ground_truth")
    raise ValueError(
        f"a rollout needs a {what}, one of the columns {list(names)}; got {sorted(row.values)} in {row.where}. Rename "
        "one."
    )


def read_rollouts(paths: Paths) -> Iterator[dict]:
    """`{"data_source", "solution_str", "ground_truth", "extra_info"}` of every row of files or folders.

    Raises:
        ValueError: what `data.rows.read_rows` refuses, or a row without response or ground truth; the message names it.
    """
    for row in read_rows(paths):
        response = _column(row, RESPONSES, "response")
        if not isinstance(response, str):
            raise ValueError(f"a response is text; got {type(response).__name__} in {row.where}.")
        yield {
            "data_source": row.values.get("data_source") or row.file.stem,
            "solution_str": response,
            "ground_truth": _column(row, GROUND_TRUTHS, "ground truth"),
            "extra_info": {"index": row.index, **(row.values.get("extra_info") or {})},
        }


def summary(results: list[dict]) -> dict[str, dict[str, float]]:
    """mean, std, min, max and number of values of every numeric part."""
    out = {}
    for key in results[0] if results else ():
        values = np.array([float(result[key]) for result in results if isinstance(result.get(key), (int, float))])
        if len(values):
            out[key] = {name: float(getattr(values, name)()) for name in ("mean", "std", "min", "max")}
            out[key]["n"] = len(values)
    return out


def score_file(options: Score, console: Console) -> int:
    """Score every rollout and print a table, a histogram and the first responses; the number of rollouts.

    Raises:
        ValueError: nothing to score, or what the reward refuses, with the row.
    """
    path, settings = options.data, options.settings
    compute_score = functools.partial(load_reward(options.reward), **settings)
    rollouts = list(itertools.islice(read_rollouts(path), options.n or None))
    results = []
    for number, rollout in enumerate(progress(rollouts, "score", unit="rollout", leave=False)):
        try:
            result = compute_score(**rollout)
        except ValueError as error:
            raise ValueError(f"row {number} of {path}: {error}") from error
        results.append(dict(result) if isinstance(result, dict) else {"score": float(result)})

    names = ("mean", "std", "min", "max")
    table = numbers_table(f"{options.reward} on {len(results)} rollouts of {path.name}", ("part", *names, "n"))
    for key, row in summary(results).items():
        table.add_row(key, *(f"{row[name]:.4g}" for name in names), str(row["n"]))
    console.print(table)
    bins = histogram([float(result["score"]) for result in results])
    most = max(count for *_, count in bins)
    for low, high, count in bins:
        console.print(
            f"{low:8.3f} .. {high:8.3f}  {'█' * round(HISTOGRAM_WIDTH * count / most)} {count}", highlight=False
        )
    for number in range(min(options.show, len(results))):
        rollout = rollouts[number]
        sizes = rollout["extra_info"].get("image_sizes")
        size = tuple(sizes[0]) if sizes is not None and len(sizes) == 1 else None
        coordinates = settings.get("coordinates", "auto")
        console.rule(f"row {number}, score {float(results[number]['score']):.4g}")
        console.print(highlighted(rollout["solution_str"], size, coordinates))
        for anchor in parse_anchors(rollout["solution_str"], size, coordinates):
            label = f"  {anchor.label}" if anchor.label else ""
            words = rollout["solution_str"][anchor.start : anchor.end]
            console.print(f"  {anchor.start:5d}  {anchor.kind:6s}  {words}{label}", markup=False, highlight=False)
    if options.out is not None:
        with options.out.open("w") as file:
            for rollout, result in zip(rollouts, results, strict=True):
                file.write(json.dumps({"index": rollout["extra_info"]["index"], **result}) + "\n")
    return len(results)
