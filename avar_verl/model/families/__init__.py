# SPDX-License-Identifier: Apache-2.0
"""Model families by `config.model_type`. Each has its own file, which ends in `FAMILY = Family(...)`.

Families from outside come first from `AVAR_FAMILY=module:FAMILY` in the environment (`avar.family` of a run), then from
the entry points of installed packages: group `avar_verl.families`, named by their `model_type`, with the value
`module:FAMILY`. Such a module may also register its model with transformers' Auto classes, since `load_outside` imports
it before a model is loaded.
"""

import functools
import importlib
import os
from importlib.metadata import entry_points

from avar_verl.model.family import Family

# model_type -> module of this package, which is imported when its family is first used.
FAMILIES: dict[str, str] = {
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "glm4v": "glm4v",
    "glm4v_moe": "glm4v_moe",
    "idefics3": "idefics3",
    "internvl": "internvl",
    "lfm2_vl": "lfm2_vl",
    "llava_next": "llava_next",
    "llava_onevision": "llava_onevision",
    "minicpmv4_6": "minicpmv4_6",
    "mistral3": "mistral3",
    "mllama": "mllama",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "smolvlm": "idefics3",
}
GROUP = "avar_verl.families"
VARIABLE = "AVAR_FAMILY"


def _import_family(path: str, named_by: str) -> Family:
    """The `Family` at `module:ATTRIBUTE`.

    Raises:
        ValueError: no such module or attribute, or something else there.
    """
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty name.
        raise ValueError(
            f"{named_by} must name a family, module:FAMILY, that can be imported; got {path!r}: {error}. Correct the "
            "name, or install the package that holds it."
        ) from error
    if not isinstance(found, Family):
        raise ValueError(
            f"{named_by} must name an avar_verl.model.family.Family; got {path!r}, which is {type(found).__name__}. "
            "End the module in FAMILY = Family(...)."
        )
    return found


@functools.cache
def _outside(variable: str) -> dict[str, Family]:
    """Families of other packages by model type, for a value of VARIABLE."""
    found: dict[str, tuple[Family, str]] = {}
    for point in entry_points(group=GROUP):
        family = _import_family(point.value, f"the entry point {point.name!r} of {GROUP}")
        taken = found[point.name][1] if point.name in found else None
        taken = "avar_verl" if point.name in FAMILIES else taken
        if taken not in (None, point.value):
            raise ValueError(
                f"a model type must have one family; got {point.name!r} in {point.value!r} and in {taken!r}. Remove "
                f"one, or choose with avar.family={point.value}."
            )
        if point.name not in family.model_types:
            raise ValueError(
                f"an entry point of {GROUP} must be named by a model_type of its family; got {point.name!r} for "
                f"{family.model_types}. Correct the name."
            )
        found[point.name] = family, point.value
    families = {name: family for name, (family, _) in found.items()}
    if variable:
        chosen = _import_family(variable, f"avar.family ({VARIABLE})")
        families.update(dict.fromkeys(chosen.model_types, chosen))
    return families


def load_outside() -> dict[str, Family]:
    """Import families from outside, once; they by model type.

    Raises:
        ValueError: one that cannot be imported, or a model type with several.
    """
    return _outside(os.environ.get(VARIABLE, ""))


def choose_family(path: str) -> None:
    """`avar.family`: use the family `module:FAMILY` in this process and in those that it starts; "" chooses none.

    Raises:
        ValueError: anything that is not a family.
    """
    if path:
        os.environ[VARIABLE] = path
        load_outside()


def known_families() -> list[str]:
    """Model types with a family, in alphabetical order."""
    return sorted({*FAMILIES, *load_outside()})


def get_family(model_type: str) -> Family:
    """The family that `config.model_type` names.

    Raises:
        ValueError: an unknown family, whose message names the known ones, or a model that is not of the chosen family.
    """
    outside, chosen = load_outside(), os.environ.get(VARIABLE)
    if model_type in outside:
        return outside[model_type]
    if chosen:
        types = _import_family(chosen, VARIABLE).model_types
        raise ValueError(
            f"avar.family must be that of the model; got {chosen!r} for model types {types} and a model of type "
            f"{model_type!r}. Leave it out, or add the type to its model_types."
        )
    if model_type not in FAMILIES:
        raise ValueError(
            f"RoleMap needs a known model family; got model_type={model_type!r}. Known families: "
            f"{', '.join(known_families())}. Add a family in a package of yours (docs/new-model.md)."
        )
    return importlib.import_module(f"avar_verl.model.families.{FAMILIES[model_type]}").FAMILY


__all__ = ["FAMILIES", "Family", "choose_family", "get_family", "known_families", "load_outside"]
