# SPDX-License-Identifier: Apache-2.0
"""Model families by `config.model_type`. Each has its own file, which ends in `FAMILY = Family(...)`."""

import importlib

from avar_verl.model.family import Family

# model_type -> module of this package, which is imported when its family is first used.
FAMILIES: dict[str, str] = {
    "gemma3": "gemma3",
    "glm4v": "glm4v",
    "idefics3": "idefics3",
    "internvl": "internvl",
    "llava_next": "llava_next",
    "llava_onevision": "llava_onevision",
    "mllama": "mllama",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "smolvlm": "idefics3",
}


def get_family(model_type: str) -> Family:
    """The family that `config.model_type` names.

    Raises:
        ValueError: an unknown family; the message names the known ones.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"RoleMap needs a known model family; got model_type={model_type!r}. Known families: "
            f"{', '.join(sorted(FAMILIES))}. Add a file to avar_verl/model/families for another one."
        )
    return importlib.import_module(f"avar_verl.model.families.{FAMILIES[model_type]}").FAMILY


__all__ = ["FAMILIES", "Family", "get_family"]
