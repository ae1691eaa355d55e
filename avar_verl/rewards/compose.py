# SPDX-License-Identifier: Apache-2.0
"""Rewards made of parts, with weights and gates from a config. Pure functions, no verl import.

    score = sum_i weight_i * gate_i * value_i,    gate_i = 1 if the gating part's value > 0.5 else 0; 1 without a gate

A part is a name in PARTS or your own function, `pkg://package.module:function` or `path/to/file.py:function`, with
verl's signature `(data_source, solution_str, ground_truth, extra_info, **kwargs)` that returns a number or a dict with
`score`.

| part | value | range |
| --- | --- | --- |
| `acc` | the answer is right (`rewards.accuracy`) | {0, 1} |
| `format` | one `<think>` block, then one `<answer>` block (`rewards.format`) | {0, 1} |
| `anchor` | distinct references to the image, spread over the reasoning (`rewards.anchors`) | [0, 1] |
| `grounding` | boxes against reference boxes (`rewards.grounding`) | [0, 1] |
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import numbers
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from avar_verl.anchors import parse_anchors, to_pixels
from avar_verl.rewards.accuracy import (
    Decimals,
    accepted_answers,
    answer_options,
    extract_answer,
    grade_answer,
    sample_name,
)
from avar_verl.rewards.anchors import anchor_score
from avar_verl.rewards.format import format_score
from avar_verl.rewards.grounding import grounding_score

GATE_THRESHOLD = 0.5
# Keys that a sample's extra_info may have; avar_verl.plugin.rollout.reward_manager fills in the first and the last.
IMAGE_SIZES, PROMPT, BOXES, BOXES_SIZE = "image_sizes", "prompt_text", "boxes", "boxes_size"


def _image_size(extra_info: Mapping | None) -> tuple[int, int] | None:
    """Size of the image that the model saw; None if unknown, or if there are several images, because a box does not say
    which one it refers to.
    """
    sizes = (extra_info or {}).get(IMAGE_SIZES)
    return tuple(sizes[0]) if sizes is not None and len(sizes) == 1 else None


def acc_part(data_source, solution_str, ground_truth, extra_info, decimals: Decimals = "exact") -> dict[str, float]:
    """`acc`: 1 if the answer is right; `pred_found`: 1 if the response has an answer.

    `extra_info["options"]`, where there is one, has the texts of the options; the ground truth names one of them.
    """
    sample = sample_name(data_source, extra_info)
    options = answer_options(extra_info, sample)
    accepted = accepted_answers(ground_truth, sample, options)
    prediction = extract_answer(solution_str)
    right = prediction is not None and grade_answer(prediction, accepted, options, decimals)
    return {"acc": float(right), "pred_found": float(prediction is not None)}


def format_part(data_source, solution_str, ground_truth, extra_info, think_in_prompt: bool = False) -> dict[str, float]:
    """`format`: 1 if the layout is right."""
    return {"format": format_score(solution_str, think_in_prompt=think_in_prompt)}


def anchor_part(
    data_source, solution_str, ground_truth, extra_info, coordinates: str = "auto", **settings
) -> dict[str, float]:
    """`anchor` and its statistics; `settings` are those of `anchor_score`."""
    info = extra_info or {}
    result = anchor_score(solution_str, _image_size(info), coordinates, info.get(PROMPT), **settings)
    return {
        "anchor": result.score,
        "num_anchors": float(result.num_anchors),
        "num_distinct_anchors": float(result.num_distinct),
        "num_coordinate_anchors": float(result.num_coordinates),
    }


def grounding_part(data_source, solution_str, ground_truth, extra_info, coordinates: str = "auto") -> dict[str, float]:
    """`grounding`, and `num_boxes` of the response.

    `extra_info["boxes"]` are the reference boxes (x1, y1, x2, y2) and `extra_info["boxes_size"]` is the (width, height)
    they refer to, for example the size of the stored image. Boxes of the response are converted from the image that the
    model saw (`extra_info["image_sizes"]`), or from relative coordinates.
    """
    info = extra_info or {}
    if info.get(BOXES) is None or info.get(BOXES_SIZE) is None:
        raise ValueError(
            f"the grounding reward compares with extra_info[{BOXES!r}], which refer to extra_info[{BOXES_SIZE!r}]; got "
            f"{sorted(info)} for {sample_name(data_source, extra_info)}. Add both columns, [] for a sample without "
            "boxes, or leave the part out."
        )
    width, height = info[BOXES_SIZE]
    reference = [(x1 / width, y1 / height, x2 / width, y2 / height) for x1, y1, x2, y2 in info[BOXES]]
    size = _image_size(info)
    found = [anchor for anchor in parse_anchors(solution_str, size, coordinates) if anchor.kind == "bbox"]
    if coordinates == "absolute" and size is None and found:
        raise ValueError(
            f"boxes in pixels need the size of the image that the model saw; got no extra_info[{IMAGE_SIZES!r}] of one "
            f"image for {sample_name(data_source, extra_info)}. Use reward.reward_manager.name=avar, which adds it."
        )
    size = size or (1000, 1000)
    predicted = []
    for anchor in found:
        x1, y1, x2, y2 = to_pixels(anchor, size, coordinates)
        predicted.append((x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1]))
    return {"grounding": grounding_score(predicted, reference), "num_boxes": float(len(predicted))}


PARTS: dict[str, Callable[..., dict[str, float]]] = {
    "acc": acc_part,
    "format": format_part,
    "anchor": anchor_part,
    "grounding": grounding_part,
}


@functools.lru_cache(maxsize=64)
def load_function(reference: str) -> Callable:
    """A custom function, named as `pkg://package.module:function` or `path/to/file.py:function`.

    (verl's `load_extern_object` does this too, but rewards must work without verl.)
    """
    module_name, _, function = reference.rpartition(":")
    if module_name.startswith("pkg://"):
        module = importlib.import_module(module_name.removeprefix("pkg://"))
    else:
        spec = importlib.util.spec_from_file_location(f"avar_reward_{Path(module_name).stem}", module_name)
        if spec is None or spec.loader is None:
            raise ValueError(
                f"a function must come from a .py file or pkg://module; got {reference!r}. Rename the file."
            )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, function)


def _user_part(reference: str, name: str) -> Callable[..., dict[str, float]]:
    function = load_function(reference)

    def part(data_source, solution_str, ground_truth, extra_info, **settings) -> dict[str, float]:
        result = function(
            data_source=data_source,
            solution_str=solution_str,
            ground_truth=ground_truth,
            extra_info=extra_info,
            **settings,
        )
        values = dict(result) if isinstance(result, Mapping) else {"score": result}
        if "score" not in values:
            raise ValueError(f"a part returns a number or a dict with 'score'; {reference} returned {sorted(values)}.")
        return {name: float(values.pop("score")), **{f"{name}/{key}": value for key, value in values.items()}}

    return part


def _is_finite(weight: Any) -> bool:
    return isinstance(weight, numbers.Real) and not isinstance(weight, bool) and math.isfinite(weight)


def check_parts(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a composition that cannot be computed.

    Raises:
        ValueError: no parts, an unknown part, field or gate, a gate that comes later, or a weight that is not finite.
    """
    if not isinstance(parts, Mapping) or not parts:
        raise ValueError(
            f"parts must be a mapping of at least one name to its settings; got {parts!r}. For example "
            "{acc: {weight: 1}, anchor: {weight: 0.3, gate: acc}}."
        )
    seen: list[str] = []
    for name, part in parts.items():
        unknown = sorted(set(part) - {"weight", "gate", "function", "settings"})
        weight = part.get("weight")
        if unknown:
            raise ValueError(f"a part has weight, gate, function and settings; got {unknown} in {name!r}.")
        if name not in PARTS and "function" not in part:
            raise ValueError(f"a part is one of {sorted(PARTS)} or names its function; got {name!r} without one.")
        if name in ("score", "reward"):
            raise ValueError(f"verl keeps {name!r} for the total; got a part of that name. Choose another.")
        if not _is_finite(weight):
            raise ValueError(f"weight must be a finite number; got {weight!r} in {name!r}. 0 only reports the part.")
        if part.get("gate") is not None and part["gate"] not in seen:
            raise ValueError(f"a gate must be an earlier part; got {part['gate']!r} in {name!r} after {seen}.")
        seen.append(name)


def composed_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None, parts: Mapping[str, Mapping]
) -> dict[str, float]:
    """Score of a response by the parts of a config: `score`, and every part's value and statistics, unweighted.

    Args:
        parts (`Mapping`):
            For every part, in order: `weight`, finite; `gate` (*optional*), the name of an earlier part whose value
            must be above 0.5 for this one to be paid; `settings` (*optional*), keyword arguments of the part;
            `function` (*optional*), a custom function.

    Returns:
        `dict[str, float]`: the same keys for every sample. `score` between the sum of the negative and the sum of the
        positive weights, for parts in [0, 1].

    Raises:
        ValueError: from `check_parts` or from a part.

    Example:
        >>> parts = {"acc": {"weight": 1.0}, "format": {"weight": 0.1, "gate": "acc"}}
        >>> composed_score("geo3k", "<think>2 + 2</think><answer>4</answer>", "4", None, parts)["score"]
        1.1
    """
    check_parts(parts)
    values: dict[str, float] = {}
    total = 0.0
    for name, part in parts.items():
        function = _user_part(part["function"], name) if "function" in part else PARTS[name]
        values.update(function(data_source, solution_str, ground_truth, extra_info, **(part.get("settings") or {})))
        gate = part.get("gate")
        if gate is None or values[gate] > GATE_THRESHOLD:
            total += part["weight"] * values[name]
    return {"score": float(total), **values}


def shipped_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None, **parts: Mapping[str, Any]
) -> dict[str, float]:
    """`composed_score` of a reward function in `reward_fns`: parts of PARTS whose weights are at least 0.

    Each weight other than that of `acc` is an option of the reward function, `PART_weight`.

    Raises:
        ValueError: a weight that is not a finite number >= 0, or from `composed_score`.
    """
    for name, part in parts.items():
        weight = part["weight"]
        if not _is_finite(weight) or weight < 0:
            raise ValueError(
                f"{name}_weight must be a finite number >= 0; got {weight!r}. "
                f"Set reward.custom_reward_function.reward_kwargs.{name}_weight, 0 to only report the part."
            )
    return composed_score(data_source, solution_str, ground_truth, extra_info, parts)
