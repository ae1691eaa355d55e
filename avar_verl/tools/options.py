# SPDX-License-Identifier: Apache-2.0
"""Shared parts of command options: parsing and validation.

A command is a frozen dataclass derived from `Command`. Each field is an option of `avar`: it
defines the name, type and default of the option, and the comment after or above it is the help.
"""

import json
import types
import typing
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec


@dataclass(frozen=True)
class AtLeast:
    """Smallest value of a number, or smallest length of a tuple: `Annotated[int, AtLeast(1)]`."""

    value: float


Count = Annotated[int, AtLeast(0)]
Size = Annotated[int, AtLeast(1)]
Files = Annotated[Positional[tuple[str, ...]], AtLeast(1), arg(metavar="FILE ...")]
Words = Annotated[tuple[str, ...] | None, AtLeast(1), arg(metavar="WORD ...")]


def _check(name: str, hint: Any, value: Any) -> None:
    """Refuse a value that does not match its type hint; None is always allowed."""
    if value is None:
        return
    if typing.get_origin(hint) in (types.UnionType, Union):
        for inner in typing.get_args(hint):
            _check(name, inner, value)
    elif typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
        raise ValueError(f"{name} must be one of {list(typing.get_args(hint))}; got {value!r}. Name one.")
    elif typing.get_origin(hint) is Annotated:
        _check(name, hint.__origin__, value)
        for limit in hint.__metadata__:
            if isinstance(limit, AtLeast):
                size = len(value) if isinstance(value, Sized) else value
                if size < limit.value:
                    raise ValueError(f"{name} must be at least {limit.value}; got {size}. Use more.")


@dataclass(frozen=True)
class Command:
    """A command of `avar` with its options.

    Raises:
        ValueError: a value that is not in its `Literal`, or below its `AtLeast`; the message names the field.
    """

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            _check(name, hint, getattr(self, name))

    def run(self) -> None:
        """Run the command. Slow imports are here, so that `--help` is fast."""
        raise NotImplementedError


def _object(words: list[str]) -> dict[str, Any]:
    value = json.loads(words[0])
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed; got {words[0]}. Write {{...}}.")
    return value


def _pairs(words: list[str]) -> dict[str, str]:
    if not words or not all("=" in word for word in words):
        raise ValueError(f"pairs are needed; got {words}. Write NAME=COLUMN.")
    return dict(word.split("=", 1) for word in words)


def _numbers(words: list[str]) -> tuple[float, ...]:
    return tuple(float(part) for part in words[0].split(","))


def _words(kind: type, metavar: str, nargs: Literal[1, "*"], parse: Callable, write: Callable) -> Any:
    """How tyro reads a value from `nargs` words and shows it in the help."""
    return PrimitiveConstructorSpec(nargs, metavar, parse, lambda value: isinstance(value, kind), write)


# A JSON object as one word; words `name=column`; numbers as one word, separated by commas.
Json = Annotated[dict[str, Any], _words(dict, "JSON", 1, _object, lambda value: [json.dumps(value)])]
Pairs = Annotated[
    dict[str, str], _words(dict, "NAME=COLUMN ...", "*", _pairs, lambda value: [f"{k}={v}" for k, v in value.items()])
]
Numbers = Annotated[
    tuple[float, ...], _words(tuple, "X,Y,...", 1, _numbers, lambda value: [",".join(f"{v:g}" for v in value)])
]


def default_device() -> str:
    """The GPU if this process sees one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
