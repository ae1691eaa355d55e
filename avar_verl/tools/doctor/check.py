# SPDX-License-Identifier: Apache-2.0
"""What a check is, and what it finds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
from safetensors import SafetensorError

if TYPE_CHECKING:
    from avar_verl.tools.doctor.subject import Subject

# Exceptions that the code of a model (config, chat template, tokenizer, processor, forward pass) and its libraries
# raise for a broken folder. They make the check fail; any other exception is a bug here and ends the program.
FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    jinja2.TemplateError,
)
STATUSES = ("pass", "warn", "fail", "skip")


class Skip(Exception):
    """The check does not apply; the message is the reason."""


@dataclass(frozen=True)
class Finding:
    """Result of a check that did not fail.

    detail: the measurement, one line.
    warning: what will go wrong, when, and what to do; makes the result a warning.
    rows: lines of a table, (name, value).
    """

    detail: str
    warning: str = ""
    rows: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Check:
    """One check.

    name: unique.
    prevents: the failure it catches, one sentence.
    fix: what to do if it fails, one sentence.
    needs: names of the checks that must not have failed.
    function: `function(subject) -> Finding | str` (a detail); raises Skip, or one of FOREIGN_ERRORS for a failure.
    """

    name: str
    prevents: str
    fix: str
    needs: tuple[str, ...]
    function: Callable[["Subject"], Finding | str]


@dataclass(frozen=True)
class Result:
    """Outcome of a check. `status` is one of STATUSES; `detail` is the measurement, the error, or the reason for
    skipping.
    """

    name: str
    status: str
    detail: str
    prevents: str
    fix: str
    rows: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0


# In running order; the modules of `avar_verl.tools.doctor.checks` register their checks when they are imported.
CHECKS: list[Check] = []


def check(
    name: str, *, prevents: str, fix: str, needs: Sequence[str] = ()
) -> Callable[[Callable[["Subject"], Finding | str]], Callable[["Subject"], Finding | str]]:
    """Register a function as the next check.

    Raises:
        ValueError: a duplicate name, or a check that needs one registered later.
    """

    def register(function: Callable[["Subject"], Finding | str]) -> Callable[["Subject"], Finding | str]:
        names = [known.name for known in CHECKS]
        if name in names or not set(needs) <= set(names):
            raise ValueError(
                f"a check needs a unique name, and only checks registered earlier; got {name!r}, which needs "
                f"{list(needs)}, after {names}. Rename it, or register it later."
            )
        CHECKS.append(Check(name, prevents, fix, tuple(needs), function))
        return function

    return register
