# SPDX-License-Identifier: Apache-2.0
"""The reward function's dicts of a batch of rollouts: the gate, and the parts to log.

Shape suffix: B = rollouts
"""

from collections.abc import Iterable
from numbers import Real

import numpy as np
import torch

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
