# SPDX-License-Identifier: Apache-2.0
"""What a check is, and what it finds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
from safetensors import SafetensorError

if TYPE_CHECKING:
    from avar_verl.tools.doctor.subject import Subject

# What the code of a model (config, chat template, tokenizer, processor, forward pass) and of its libraries raises over
# a folder that is broken. Such an error is the check's failure; any other is a bug here and ends the program.
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
    """What a check that did not fail has to say.

    detail: what was measured, one line.
    warning: what will go wrong in which case, and what to do; makes the result a warning.
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
    mend: what to do when it fails, one sentence.
    needs: names of the checks that must not have failed.
    function: `function(subject) -> Finding | str` (a detail); raises Skip, or one of FOREIGN_ERRORS for a failure.
    """

    name: str
    prevents: str
    mend: str
    needs: tuple[str, ...]
    function: Callable[["Subject"], Finding | str]


@dataclass(frozen=True)
class Result:
    """Outcome of a check. `status` is one of STATUSES; `detail` a measured number, the error, or the reason to skip."""

    name: str
    status: str
    detail: str
    prevents: str
    mend: str
    rows: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0


# In the order in which they run: the modules of `avar_verl.tools.doctor.checks` fill it when they are imported.
CHECKS: list[Check] = []


def check(
    name: str, *, prevents: str, mend: str, needs: Sequence[str] = ()
) -> Callable[[Callable[["Subject"], Finding | str]], Callable[["Subject"], Finding | str]]:
    """Register a function as the next check.

    Raises:
        ValueError: a second check of this name, or one that needs a check behind it.
    """

    def register(function: Callable[["Subject"], Finding | str]) -> Callable[["Subject"], Finding | str]:
        names = [known.name for known in CHECKS]
        if name in names or not set(needs) <= set(names):
            raise ValueError(
                f"a check needs a name of its own, and checks before it; got {name!r}, which needs {list(needs)}, "
                f"behind {names}. Rename it, or register it later."
            )
        CHECKS.append(Check(name, prevents, mend, tuple(needs), function))
        return function

    return register
