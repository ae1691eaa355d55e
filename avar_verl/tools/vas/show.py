# SPDX-License-Identifier: Apache-2.0
"""Print a measurement in the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from avar_verl.objectives.vas import BANDS, STATISTICS
from avar_verl.tools.text import numbers_table

CORRUPTED = {"blank": "a blank image", "swap": "the image of another row"}


def number(value: float | str, digits: int = 4) -> str:
    """A number of any size in few characters."""
    return f"{float(value):.{digits}g}"


def estimate(part: Mapping[str, Any]) -> str:
    """The value and, on a second line, its interval if there is one; the bracket is escaped for rich."""
    text = number(part["value"])
    return text if part["low"] is None else f"{text}\n\\[{number(part['low'], 3)}, {number(part['high'], 3)}]"


def print_summary(summary: Mapping[str, Any], out: Path | None, console: Console) -> None:
    """Tables of VAS and of the visual dependency, and the paths of the files."""
    if summary["queries"]:
        console.print(_vas_table(summary))
    if summary["dependency"] is not None:
        console.print(_dependency_table(summary))
    console.print(f"measured on {summary['device']} in {summary['dtype']}")
    if summary["queries"]:
        bounds = ", ".join(f"{name} below {bound:g}" for bound, name in BANDS[:-1])
        console.print(f"bands (user tokens of 7B models): {bounds}, {BANDS[-1][1]} above")
    if out is not None:
        console.print(f"report: {out / 'report.html'}", soft_wrap=True)


def _vas_table(summary: Mapping[str, Any]) -> Table:
    """One column per query role, one row per statistic."""
    queries = summary["queries"]
    columns = ["\\[95 % interval]", *(f"{name} tokens" for name in queries)]
    table = numbers_table(f"VAS of {summary['model']}", columns)
    for key in STATISTICS:
        table.add_row(key, *(estimate(query["overall"][key]) for query in queries.values()))
    table.add_row("band of the paper", *(query["band"] or "none" for query in queries.values()))
    table.add_row("samples", *(str(query["num_samples"]) for query in queries.values()))
    for reason in sorted({reason for query in queries.values() for reason in query["skipped"]}):
        table.add_row(f"skipped: {reason}", *(str(query["skipped"].get(reason, 0)) for query in queries.values()))
    return table


def _dependency_table(summary: Mapping[str, Any]) -> Table:
    dependency = summary["dependency"]
    title = f"visual dependency of {summary['model']}, against {CORRUPTED[summary['corruption']]}"
    table = numbers_table(title, ["\\[95 % interval]", "response tokens"])
    table.add_row("dependency (nats per token)", estimate(dependency["overall"]))
    table.add_row("samples", str(dependency["num_samples"]))
    for reason, count in dependency["skipped"].items():
        table.add_row(f"skipped: {reason}", str(count))
    return table
