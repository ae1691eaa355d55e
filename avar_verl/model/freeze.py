# SPDX-License-Identifier: Apache-2.0
"""Freezing the vision tower and the projector: pure torch, no verl import.

verl 0.9.1 declares `actor.freeze_vision_tower` (verl/trainer/config/actor/actor.yaml) and never reads it.
"""

import re
from collections.abc import Iterable, Sequence

import torch

from avar_verl.model.families import get_family


def freeze_vision(model: torch.nn.Module, model_type: str, tower: bool, projector: bool) -> list[str]:
    """Turn off gradients of the vision tower, of the projector into the language model, or of both.

    Args:
        model: a bare transformers vision-language model, not yet sharded.
        model_type: `config.model_type`, which names the family.
        tower: freeze the vision tower, and towers for other inputs (`Family.other_towers`). A projector inside it
            (Qwen's merger) is not part of it.
        projector: freeze the projector.

    Returns:
        Names of the frozen parameters, empty when both are False.

    Raises:
        ValueError: an unknown family, or a part that has no parameters in this model.
    """
    if not (tower or projector):
        return []
    family = get_family(model_type)
    prefixes = {"tower": family.towers, "projector": family.projectors}
    names: dict[str, list[str]] = {"tower": [], "projector": []}
    for name, _ in model.named_parameters():
        for part in ("projector", "tower"):  # A projector may be inside the tower.
            if name.startswith(tuple(prefix + "." for prefix in prefixes[part])):
                names[part].append(name)
                break
    frozen = []
    for part, wanted in (("tower", tower), ("projector", projector)):
        if wanted and not names[part]:
            raise ValueError(
                f"freezing the vision {part} needs parameters under {' or '.join(map(repr, prefixes[part]))}; got none "
                f"in {type(model).__name__}. Correct the name in avar_verl/model/families for "
                f"model_type={model_type!r}."
            )
        frozen += names[part] if wanted else []
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def excluded_modules(frozen: Iterable[str], exclude: str | Sequence[str] | None) -> str | list[str]:
    """`LoraConfig.exclude_modules` for a model with frozen parts: no adapter is to train there.

    Args:
        frozen: names of frozen parameters, from `freeze_vision`.
        exclude: what is excluded anyway, in one of peft's forms: a regular expression, or ends of names.

    >>> excluded_modules(["visual.qkv.weight", "visual.qkv.bias"], ["lm_head"])
    ['lm_head', 'visual.qkv']
    >>> excluded_modules(["visual.qkv.weight"], "lm_.*")
    '(?:lm_.*)|(?:visual\\\\.qkv)'
    """
    modules = sorted({name.rpartition(".")[0] for name in frozen})
    if isinstance(exclude, str):
        return f"(?:{exclude})|(?:{'|'.join(map(re.escape, modules))})"
    return [*(exclude or ()), *modules]


def freeze_adapters(model: torch.nn.Module, frozen: Iterable[str]) -> None:
    """Turn off gradients of adapters in frozen parts, which an adapter that was loaded may have.

    Args:
        model: a peft model of the model whose parameters `frozen` names.
    """
    modules = tuple({f"base_model.model.{name.rpartition('.')[0]}." for name in frozen})
    for name, parameter in model.named_parameters():
        if name.startswith(modules):
            parameter.requires_grad_(False)
