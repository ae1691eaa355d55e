# SPDX-License-Identifier: Apache-2.0
"""`avar vas compare`: compares checkpoints, and correlates VAS and visual dependency with benchmark scores.

Differences are paired if two measurements share samples (same row, same prompt): both use the same draws of the shared
samples, so effects of a sample on both cancel. A correlation is over checkpoints; its interval is the percentile
bootstrap over them. Draws in which it is undefined, because they have only one distinct value, are left out and
counted. With few checkpoints such an interval is too narrow: if they are in order, every draw is.

Shape suffixes: N = samples or checkpoints, D = draws, the first of which takes each once
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from avar_verl.objectives.vas import STATISTICS, vas_statistics
from avar_verl.tools.report import numbers
from avar_verl.tools.runs import dumps, write_json
from avar_verl.tools.stats import LEVEL, Bootstrap, correlate, with_interval
from avar_verl.tools.text import numbers_table
from avar_verl.tools.vas.command import Compare
from avar_verl.tools.vas.score import DEPENDENCY, SUMS
from avar_verl.tools.vas.show import CORRUPTED, estimate
from avar_verl.tools.vas.statistics import MEAN_STATISTICS, means

# Statistics that are correlated with scores; the others are functions of these or redundant.
CORRELATED = ("vas", "log_ratio", "image_share")
MIN_MODELS = 3
MEAN = "mean"


@dataclass(frozen=True)
class Measurement:
    """A `vas.json` with its name in the comparison."""

    name: str
    summary: Mapping[str, Any]

    @property
    def corruption(self) -> str | None:
        """Of the visual dependency; None if it was not measured (or by a version without it)."""
        return self.summary.get("corruption")


def read_measurements(files: Sequence[str]) -> list[Measurement]:
    """Parse `[NAME=]FILE`; the default name is that of the folder.

    Raises:
        ValueError: fewer than two files, a file that is not a `vas.json`, a repeated name, or neither a common query
            role nor a common corruption.
    """
    if len(files) < 2:
        raise ValueError(f"a comparison needs at least two files; got {len(files)}. Name another vas.json.")
    out: list[Measurement] = []
    for text in files:
        name, found, path_text = text.partition("=")
        path = Path(path_text if found else text)
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} must be a vas.json; got: {error}. Name the file that avar vas wrote.") from error
        if not isinstance(summary, dict) or summary.get("format") != 1 or "samples" not in summary:
            raise ValueError(f"{path} must be a vas.json; got something else. Name the file that avar vas wrote.")
        name = name if found else path.resolve().parent.name
        if name in {one.name for one in out}:
            raise ValueError(f"checkpoints need names of their own; got {name!r} twice. Write NAME={path}.")
        out.append(Measurement(name, summary))
    if not common_queries(out) and common_corruption(out) is None:
        found = [(sorted(one.summary["queries"]), one.corruption) for one in out]
        raise ValueError(
            f"a comparison needs a query role or a dependency that all have; got {found}. Measure them alike."
        )
    return out


def common_queries(measurements: Sequence[Measurement]) -> list[str]:
    """Query roles that all measurements have."""
    first, *others = (one.summary["queries"] for one in measurements)
    return [name for name in first if all(name in other for other in others)]


def common_corruption(measurements: Sequence[Measurement]) -> str | None:
    """The corruption of all measurements; None if they differ, since dependencies on different ones do not compare."""
    found = {one.corruption for one in measurements}
    return found.pop() if len(found) == 1 else None


# ---- differences -----------------------------------------------------------------------------------------------


def shared_samples(one: Measurement, other: Measurement, query: str) -> tuple[list[int], list[int]]:
    """Indices, in either measurement, of the samples that both measured for a query role, or for DEPENDENCY."""

    def keys(measurement: Measurement) -> dict[tuple, int]:
        samples = measurement.summary["samples"]
        triples = zip(samples["row"], samples["sample"], samples[query]["queries"], strict=True)
        return {(row, sample): at for at, (row, sample, queries) in enumerate(triples) if queries is not None}

    first, second = keys(one), keys(other)
    shared = [key for key in first if key in second]
    return [first[key] for key in shared], [second[key] for key in shared]


def _statistics(measurement: Measurement, query: str, indices: Sequence[int], counts_DN: torch.Tensor) -> dict:
    """(D,) of MEAN_STATISTICS, or of DEPENDENCY, over selected samples."""
    columns = measurement.summary["samples"][query]
    if query == DEPENDENCY:
        values = torch.from_numpy(numbers(columns[DEPENDENCY])[list(indices)])
        return means(counts_DN, torch.ones(len(values)), {DEPENDENCY: values})
    chosen = {key: torch.from_numpy(numbers(columns[key])[list(indices)]) for key in ("queries", *SUMS)}
    sums = {key: chosen[key][:, None, None] for key in SUMS}
    mean_of = means(counts_DN, chosen["queries"], sums)
    return vas_statistics(*(mean_of[key] for key in SUMS))


def differences(one: Measurement, reference: Measurement, query: str, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """`one` minus `reference` in MEAN_STATISTICS, or in DEPENDENCY if this is the query, paired, with `num_samples`;
    None without a shared sample.

    The median over heads would need sums by head, which `vas.json` does not have per sample.
    """
    mine, theirs = shared_samples(one, reference, query)
    if not mine:
        return None
    counts_DN = torch.from_numpy(bootstrap.counts(len(mine)))
    value, other = (_statistics(m, query, at, counts_DN) for m, at in ((one, mine), (reference, theirs)))
    parts = {key: with_interval(value[key] - other[key]) for key in value if key in (*MEAN_STATISTICS, DEPENDENCY)}
    return {"num_samples": len(mine), **parts}


# ---- scores ----------------------------------------------------------------------------------------------------


def read_scores(path: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """Benchmark -> score of every checkpoint in the order of `names`; plus `mean` if there are several benchmarks.

    Raises:
        ValueError: no column `name`, a checkpoint without a row, or a score that is not a finite number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"scores must be a CSV file; got {path}: {error.strerror}. Check the path.") from error
    columns = list(rows[0]) if rows else []
    if "name" not in columns or len(columns) < 2:
        raise ValueError(f"{path} must have a column `name` and one for every benchmark; got {columns}. Add a header.")
    by_name = {row["name"]: row for row in rows}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(f"{path} must have a row for every checkpoint; got none for {missing}. Add them.")
    out: dict[str, list[float]] = {}
    for column in columns:
        if column == "name":
            continue
        out[column] = []
        for name in names:
            text = by_name[name][column]
            try:
                value = float(text)
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise ValueError(f"scores must be finite numbers; got {text!r} for {name} in {column}. Correct {path}.")
            out[column].append(value)
    if len(out) > 1 and MEAN not in out:
        out[MEAN] = [sum(values) / len(values) for values in zip(*out.values(), strict=True)]
    return out


# ---- the command -----------------------------------------------------------------------------------------------


def compare(
    measurements: Sequence[Measurement], scores: Mapping[str, list[float]] | None, bootstrap: Bootstrap
) -> dict[str, Any]:
    """Content of `compare.json`.

    Raises:
        ValueError: scores of fewer than MIN_MODELS checkpoints.
    """
    if scores is not None and len(measurements) < MIN_MODELS:
        raise ValueError(
            f"a correlation needs at least {MIN_MODELS} checkpoints; got {len(measurements)}. Leave --scores out, or "
            "measure more."
        )
    reference, *others = measurements
    out: dict[str, Any] = {
        "names": [one.name for one in measurements],
        "models": [one.summary["model"] for one in measurements],
        "data": [one.summary["data"] for one in measurements],
        "bootstrap": {"draws": bootstrap.num_draws, "seed": bootstrap.seed, "level": LEVEL},
        "scores": scores,
        "queries": {},
        "dependency": None,
        "uncompared": None,  # The corruptions of the files, if they differ.
    }

    def entry_of(query: str, parts: Sequence[Mapping[str, Any]], correlated: Sequence[str]) -> dict[str, Any]:
        entry = {
            "overall": {one.name: part["overall"] for one, part in zip(measurements, parts, strict=True)},
            "num_samples": {one.name: part["num_samples"] for one, part in zip(measurements, parts, strict=True)},
            "difference": {one.name: differences(one, reference, query, bootstrap) for one in others},
        }
        if scores is not None:
            values = {key: [float(numbers(part["overall"][key]["value"])) for part in parts] for key in correlated}
            entry["correlation"] = {
                key: {benchmark: correlate(values[key], score, bootstrap) for benchmark, score in scores.items()}
                for key in correlated
            }
        return entry

    for query in common_queries(measurements):
        parts = [one.summary["queries"][query] for one in measurements]
        entry = entry_of(query, parts, CORRELATED)
        entry["band"] = {one.name: part["band"] for one, part in zip(measurements, parts, strict=True)}
        out["queries"][query] = entry
    corruption = common_corruption(measurements)
    if corruption is not None:
        parts = [one.summary["dependency"] for one in measurements]
        parts = [{**part, "overall": {DEPENDENCY: part["overall"]}} for part in parts]
        out["dependency"] = {"corruption": corruption, **entry_of(DEPENDENCY, parts, (DEPENDENCY,))}
    elif any(one.corruption for one in measurements):
        out["uncompared"] = {one.name: one.corruption for one in measurements}
    return out


def print_comparison(result: Mapping[str, Any], console: Console) -> None:
    """Tables of values, differences and correlations."""
    for query, entry in result["queries"].items():
        _print_entry(result, entry, f"attention of {query} tokens", f"{query} tokens", STATISTICS, console)
    if result["dependency"] is not None:
        corrupted = CORRUPTED[result["dependency"]["corruption"]]
        what = f"visual dependency of responses against {corrupted}, nats per token"
        _print_entry(result, result["dependency"], what, "responses", (DEPENDENCY,), console)
    if result["uncompared"]:
        console.print(uncompared_text(result["uncompared"]))


def uncompared_text(corruptions: Mapping[str, str | None]) -> str:
    """Why dependencies are not compared."""
    found = ", ".join(f"{name}: {corruption or 'not measured'}" for name, corruption in corruptions.items())
    return f"Visual dependency is compared if all checkpoints have it with the same corruption; here {found}."


def _print_entry(
    result: Mapping[str, Any], entry: Mapping[str, Any], title: str, what: str, keys: Sequence[str], console: Console
) -> None:
    table = numbers_table(f"{title} [95 % interval]", ["", *result["names"]])
    for key in keys:
        table.add_row(key, *(estimate(entry["overall"][name][key]) for name in result["names"]))
    if "band" in entry:
        table.add_row("band of the paper", *(entry["band"][name] or "none" for name in result["names"]))
    table.add_row("samples", *(str(entry["num_samples"][name]) for name in result["names"]))
    console.print(table)
    found = {name: part for name, part in entry["difference"].items() if part is not None}
    if found:
        table = numbers_table(f"paired difference from {result['names'][0]}, {what}", ["", *found])
        for key in keys:
            if all(key in part for part in found.values()):
                table.add_row(key, *(estimate(part[key]) for part in found.values()))
        table.add_row("shared samples", *(str(part["num_samples"]) for part in found.values()))
        console.print(table)
    for name in entry["difference"].keys() - found.keys():
        console.print(f"{name} shares no sample with {result['names'][0]}: no paired difference of {what}")
    for key, by_benchmark in entry.get("correlation", {}).items():
        table = numbers_table(
            f"{key} of {what} against scores", ["", "Pearson", "Spearman", "checkpoints", "undefined draws"]
        )
        for benchmark, part in by_benchmark.items():
            cells = [estimate(part["pearson"]), estimate(part["spearman"])]
            table.add_row(benchmark, *cells, str(part["num_models"]), str(part["undefined"]))
        console.print(table)


def run_compare(options: Compare, console: Console) -> dict[str, Any]:
    """Compare, print, and with a folder `out` write `compare.json` and `compare.html`; returns the content of the
    first.

    Raises:
        ValueError: files or scores that cannot be compared.
    """
    out = options.out
    if out is not None:
        from avar_verl.tools.vas.run import check_report_packages

        check_report_packages()
    measurements = read_measurements(options.files)
    names = [one.name for one in measurements]
    scores = None if options.scores is None else read_scores(options.scores, names)
    result = json.loads(dumps(compare(measurements, scores, Bootstrap())))
    print_comparison(result, console)
    if out is not None:
        from avar_verl.tools.vas.compare_report import write_compare_report

        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "compare.json", result)
        write_compare_report(out / "compare.html", result, measurements)
        console.print(f"report: {out / 'compare.html'}", soft_wrap=True)
    return result
