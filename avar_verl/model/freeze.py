# SPDX-License-Identifier: Apache-2.0
"""Freezing the vision tower and the projector: pure torch, no verl import.

verl 0.9.1 declares `actor.freeze_vision_tower` (verl/trainer/config/actor/actor.yaml) and never reads it.
"""

import torch

from avar_verl.model.families import get_family


def freeze_vision(model: torch.nn.Module, model_type: str, tower: bool, projector: bool) -> list[str]:
    """Turn off gradients of the vision tower, of the projector into the language model, or of both.

    Args:
        model: a bare transformers vision-language model, not yet sharded.
        model_type: `config.model_type`, which names the family.
        tower: freeze the vision tower. A projector inside it (Qwen's merger) is not part of it.
        projector: freeze the projector.

    Returns:
        Names of the frozen parameters, empty when both are False.

    Raises:
        ValueError: an unknown family, or a part that has no parameters in this model.
    """
    if not (tower or projector):
        return []
    family = get_family(model_type)
    prefixes = {"tower": (family.vision_tower,), "projector": family.projectors}
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
