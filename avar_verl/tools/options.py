# SPDX-License-Identifier: Apache-2.0
"""Shared parts of command options: parsing and validation.

A command is a frozen dataclass derived from `Command`. Each field is an option of `avar`: it
defines the name, type and default of the option, and the comment after or above it is the help.
"""

import json
import types
import typing
from collections.abc import Sized
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


Json = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]
"""A JSON object as one word."""

Pairs = Annotated[
    dict[str, str],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=COLUMN ...",
        instance_from_str=_pairs,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{name}={column}" for name, column in value.items()],
    ),
]
"""`name=column` words."""

Numbers = Annotated[
    tuple[float, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="X,Y,...",
        instance_from_str=_numbers,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(f"{number:g}" for number in value)],
    ),
]
"""Numbers as one word, separated by commas."""


def default_device() -> str:
    """The GPU if this process sees one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
