# SPDX-License-Identifier: Apache-2.0
"""The reward function's dicts of a batch of rollouts: the gate, and the parts to log.

Shape suffixes: B = rollouts, F = fields of VISUAL_FIELDS
"""

import math
from collections.abc import Iterable
from numbers import Real

import numpy as np
import torch

from avar_verl.objectives.vars import VISUAL_FIELDS, shape_visual_reward
from avar_verl.plugin.config import VarsConfig


def reward_infos(extra_fields: Iterable[dict]) -> list[dict]:
    """The reward function's dict of every rollout; empty where no reward function was called.

    verl calls none for a colocated reward model and for agent loops that return a score of their own.
    """
    return [extra.get("reward_extra_info") or {} for extra in extra_fields]


def correct_answers(infos: list[dict], real: list[bool], vars_config: VarsConfig) -> torch.Tensor:
    """(B,) bool: the gate's value of the reward function's dict is above the threshold; False on padding rows.

    Raises:
        ValueError: a rollout has no reward function's dict, or one without the gate's key.
    """
    key = vars_config.gate_key
    for info, keep in zip(infos, real, strict=True):
        if keep and key not in info:
            returned = f"it returned {sorted(info)}" if info else "no reward function was called"
            raise ValueError(
                f"r_visual is paid only for correct answers, which the reward function's {key!r} marks; {returned}. "
                f"Return {key!r} from compute_score, or set avar.vars.gate_key; a colocated reward model and agent "
                "loops that score themselves have no gate and need avar.vars.lambda_v=0."
            )
    values = [keep and float(info[key]) > vars_config.gate_threshold for info, keep in zip(infos, real, strict=True)]
    return torch.tensor(values)


def gate_if_any(infos: list[dict], real: list[bool], vars_config: VarsConfig) -> torch.Tensor | None:
    """`correct_answers`; None if nothing is paid (lambda_v = 0) and no reward function was called for any rollout."""
    if vars_config.lambda_v == 0 and not any(infos):
        return None
    return correct_answers(infos, real, vars_config)


def reward_part_metrics(infos: list[dict], real: list[bool]) -> dict[str, float]:
    """`avar/reward/<key>`: mean of every numeric part of the reward function's dict, over real rollouts that have it.

    Data sources may return different parts.
    """
    values: dict[str, list[float]] = {}
    for info, keep in zip(infos, real, strict=True):
        for key, value in info.items() if keep else ():
            if isinstance(value, Real | np.bool_):
                values.setdefault(key, []).append(float(value))
    return {f"avar/reward/{key}": sum(own) / len(own) for key, own in values.items()}


def validation_parts(
    visual_BF: torch.Tensor, infos: list[dict], groups: list, vars_config: VarsConfig
) -> list[dict[str, float | None]]:
    """`vas`, `ratio`, `image_share`, `dependency`, `r_visual_raw`, `r_visual_gated`, `r_visual_weighted` of validation
    rollouts, as far as they are measured.

    None, which verl leaves out of its means, if a rollout has no response or, but for the dependency, no system turn;
    its r_visual is 0. The last two need a gate.
    """
    names = ("vas", "ratio", "image_share") if vars_config.measures_masses else ()
    names += ("dependency",) if vars_config.measures_dependency else ()
    columns = {name: visual_BF[:, VISUAL_FIELDS.index(name)] for name in names}
    correct_B = gate_if_any(infos, [True] * len(infos), vars_config)
    if vars_config.measures_statistic:
        columns["r_visual_raw"] = raw_B = visual_BF[:, VISUAL_FIELDS.index(vars_config.statistic)]
    if vars_config.measures_statistic and correct_B is not None:
        paid_B = correct_B & torch.isfinite(raw_B)
        gated_B = shape_visual_reward(raw_B, paid_B, groups, vars_config.shaping, vars_config.clip_max)
        columns |= {"r_visual_gated": gated_B, "r_visual_weighted": vars_config.lambda_v * gated_B}
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {name: value if math.isfinite(value) else None for name, value in zip(columns, row, strict=True)}
        for row in rows
    ]
