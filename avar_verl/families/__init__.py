# SPDX-License-Identifier: Apache-2.0
"""Model families by `config.model_type`, each in a file of its own.

A family is a module with `role_map(tokenizer, config) -> RoleMap` and the names of the modules VISION_TOWER and
PROJECTOR in its transformers model.
"""

from types import ModuleType

from avar_verl.families import qwen2_5_vl

FAMILIES: dict[str, ModuleType] = {
    "qwen2_5_vl": qwen2_5_vl,
}


def get_family(model_type: str) -> ModuleType:
    """The family of `config.model_type`.

    Raises:
        ValueError: an unknown family; the message names the known ones.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise ValueError(
            f"RoleMap needs a known model family; got model_type={model_type!r}. "
            f"Known families: {', '.join(sorted(FAMILIES))}. Add a file to avar_verl/families for another one."
        )
    return family
