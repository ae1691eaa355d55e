# SPDX-License-Identifier: Apache-2.0
"""Packed samples of Qwen3.5 without flash-linear-attention.

verl hands the bounds of packed samples to the kernel of gated DeltaNet if it takes `cu_seqlens`, and else runs it for
each sample (verl/models/transformers/qwen3_5.py:158-191). It believes that a function with `**kwargs` takes them
(`_call_accepts_kwarg`, :41). transformers' own kernel, which runs where flash-linear-attention is not installed, has
`**kwargs` and ignores them (models/qwen3_5/modeling_qwen3_5.py:246), so that the state of one sample would go on into
the next. Here only a parameter of that name counts.
"""

from collections.abc import Callable
from inspect import signature
from types import ModuleType
from typing import Any

from avar_verl.plugin.compat.replace import replace


def names_kwarg(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in signature(function).parameters


def apply(qwen3_5: ModuleType) -> None:
    """Replace `_call_accepts_kwarg` of `verl.models.transformers.qwen3_5`."""
    replace(qwen3_5, "_call_accepts_kwarg", names_kwarg)
