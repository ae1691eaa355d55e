# SPDX-License-Identifier: Apache-2.0
"""What an intervention does, and its text form: `alpha_img=0.15,alpha_sys=0.4,layers=0-13,heads=0-3`.

    Z' = Z + alpha_img * M_img (*) Z - alpha_sys * M_sys (*) Z

Z are the pre-softmax logits of a selected layer and head; M_img is 1 on image keys, M_sys is 1 on system keys. Z =
scale * q.k is linear in the keys, so attention computes Z' if image keys are multiplied by (1 + alpha_img) and system
keys by (1 - alpha_sys), after the rotary embedding.

Shape suffixes: K = key/value heads, R = token roles
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from avar_verl.model.layers import select_layers
from avar_verl.model.roles import TokenRole

GRAMMAR = "alpha_img=NUMBER,alpha_sys=NUMBER,layers=0-13,20,heads=0-3"
_ALPHAS = ("alpha_img", "alpha_sys")
_LISTS = ("layers", "heads")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
# Ranges of a spec are expanded before they are compared with a model. No model has more layers or heads than this.
_MOST_INDICES = 4096


@dataclass(frozen=True)
class InterventionSpec:
    """One setting of the intervention; the default does nothing.

    alpha_img: image logits are multiplied by 1 + alpha_img; in [-1, inf). 0 disables it. Paper: 0.15.
    alpha_sys: system logits are multiplied by 1 - alpha_sys; in (-inf, 1]. 0 disables it. Paper: 0, 0.05, 0.4, 0.6.
    layers: ascending indices of decoder layers, None for all with a full softmax.
    heads: ascending indices of query heads, the same in every selected layer, None for all. Query heads that share a
        key/value head share its keys, so they can only be selected together (`key_factors`).

    Raises:
        ValueError: an alpha out of range, or indices that are not ascending and distinct.
    """

    alpha_img: float = 0.0
    alpha_sys: float = 0.0
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self):
        for name, ok, rule in (
            ("alpha_img", self.alpha_img >= -1, "at least -1, where image keys vanish"),
            ("alpha_sys", self.alpha_sys <= 1, "at most 1, where system keys vanish"),
        ):
            value = float(getattr(self, name)) + 0.0  # -0 becomes 0: equal specs have equal texts.
            object.__setattr__(self, name, value)
            if not math.isfinite(value) or not ok:
                raise ValueError(f"{name} must be a number, {rule}; got {value}. A logit must not change its sign.")
        for name in _LISTS:
            indices = getattr(self, name)
            if indices is not None and (
                not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= _MOST_INDICES
            ):
                raise ValueError(
                    f"{name} must be ascending, distinct indices from 0 on; got {list(indices)}. Leave {name} out for "
                    "all of them."
                )

    @classmethod
    def parse(cls, text: str) -> "InterventionSpec":
        """Parse the text form of a spec, ignoring white space; `str(spec)` is the shortest text.

        >>> InterventionSpec.parse("alpha_img=0.15, layers=0-2,5")
        InterventionSpec(alpha_img=0.15, alpha_sys=0.0, layers=(0, 1, 2, 5), heads=None)

        Raises:
            ValueError: an unknown or repeated name, an invalid number or range, or anything that the class refuses.
        """
        values: dict[str, str] = {}
        name = ""
        for item in "".join(text.split()).split(","):
            if "=" in item:
                name, _, item = item.partition("=")
                if name not in (*_ALPHAS, *_LISTS) or name in values:
                    raise ValueError(
                        f"an intervention is written {GRAMMAR}, each name at most once; got {name!r} in {text!r}. "
                        "Correct the text."
                    )
                values[name] = item
            elif name in _LISTS:  # `layers=0-3,8`: the list continues.
                values[name] += f",{item}"
            else:
                raise ValueError(f"an intervention is written {GRAMMAR}; got {item!r} in {text!r}. Correct it.")
        fields: dict[str, Any] = {}
        for name, value in values.items():
            fields[name] = _number(name, value) if name in _ALPHAS else tuple(_indices(name, value))
        return cls(**fields)

    @classmethod
    def of(cls, spec: "InterventionSpec | str | None") -> "InterventionSpec":
        """A spec from a spec, its text, or None (no intervention)."""
        if spec is None:
            return cls()
        return cls.parse(spec) if isinstance(spec, str) else spec

    def __str__(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in _ALPHAS]
        parts += [f"{name}={_ranges(getattr(self, name))}" for name in _LISTS if getattr(self, name) is not None]
        return ",".join(parts)

    @property
    def is_identity(self) -> bool:
        """Whether the spec changes nothing, whatever its layers and heads."""
        return self.alpha_img == 0 and self.alpha_sys == 0

    def chosen_layers(self, text_config: Any) -> tuple[int, ...]:
        """The selected layers; None are those with a full softmax (`model.layers.full_softmax_layers`).

        Raises:
            ValueError: a layer that the model does not have, or one whose logits are not linear in its keys.
        """
        if self.layers is not None:
            _among("layers", self.layers, text_config.num_hidden_layers)
        return select_layers(text_config, self.layers, windowed=True)

    def key_factors(self, num_heads: int, num_kv_heads: int) -> torch.Tensor:
        """Factors for the keys of a selected layer, (K, R) float32: 1 except for IMAGE and SYSTEM.

        Args:
            num_heads: query heads of a layer; `num_heads // num_kv_heads` consecutive ones share a key/value head.

        Raises:
            ValueError: a head that the model does not have, or one selected without the others that share its keys.
        """
        heads = set(_among("heads", self.heads, num_heads))
        factors_KR = torch.ones(num_kv_heads, len(TokenRole))
        shared = num_heads // num_kv_heads
        for group in range(num_kv_heads):
            members = set(range(group * shared, (group + 1) * shared))
            if not members & heads:
                continue
            if not members <= heads:
                raise ValueError(
                    f"query heads that share a key/value head must be chosen together: {min(members)} to "
                    f"{max(members)} do; got {sorted(members & heads)} of them. Name heads in groups of {shared}."
                )
            factors_KR[group, TokenRole.IMAGE] = 1 + self.alpha_img
            factors_KR[group, TokenRole.SYSTEM] = 1 - self.alpha_sys
        return factors_KR


def scale_keys(key: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Keys times float32 factors (broadcast), rounded once to the type of the keys."""
    return (key * factors).to(key.dtype)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number; got {text!r}. Write {name}=0.15.") from error


def _indices(name: str, text: str) -> Iterator[int]:
    """The indices of `0-3,8`, in the order they are written."""
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last >= _MOST_INDICES:
            raise ValueError(
                f"{name} are indices and ranges up to {_MOST_INDICES - 1}, the smaller one first; got {part!r}. Write "
                f"{name}=0-3,8."
            )
        yield from range(first, last + 1)


def _ranges(indices: tuple[int, ...]) -> str:
    """`0-3,8` for (0, 1, 2, 3, 8)."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _among(name: str, indices: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    if indices is None:
        return tuple(range(count))
    if indices[-1] >= count:
        raise ValueError(
            f"{name} must be among the {count} of the model; got {_ranges(indices)}. Count from 0 to {count - 1}."
        )
    return indices
