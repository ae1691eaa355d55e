# SPDX-License-Identifier: Apache-2.0
"""Accuracy and format as a verl reward function: the text part of the AVAR reward.

    reward.custom_reward_function.path=pkg://reward_fns.avar reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.format_weight=0.1

A path to this file works as well as `pkg://`. `reward_kwargs` needs the `+`, since verl's yaml does not declare it.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

from avar_verl.rewards.accuracy import accepted_answers, extract_answer, grade_answer, sample_name
from avar_verl.rewards.format import format_score


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict | None = None,
    format_weight: float = 0.1,
    think_in_prompt: bool = False,
    **kwargs: Any,
) -> dict[str, float]:
    """Score a response: `score = acc + format_weight * format`.

    The paper's `r_total = r_accuracy + lambda_v * r_visual + lambda_f * r_format` with `lambda_f = 0.1`, without
    `r_visual`: that one needs attention, which a reward function does not see, so the trainer adds it.

    Args:
        data_source (`str`):
            Name of the data set, used in error messages only.
        solution_str (`str`):
            Decoded response, without the prompt.
        ground_truth (`str`, number, or `list` of these):
            Accepted answer or answers.
        extra_info (`dict`, *optional*):
            Further columns of the sample; `index` is used in error messages only.
        format_weight (`float`, *optional*, defaults to `0.1`):
            lambda_f, finite and >= 0. 0 disables the format term; `format` is still reported.
        think_in_prompt (`bool`, *optional*, defaults to `False`):
            Whether the prompt ends with `<think>`, see `format_score`.
        kwargs:
            What verl passes beyond that (such as `reward_router_address`); not used.

    Returns:
        `dict[str, float]`: the same keys for every sample. `score` in [0, 1 + format_weight]; unweighted and in {0, 1}:
        `acc`, 1 if the answer is right; `format`, 1 if the layout is right; `pred_found`, 1 if the response has an
        answer.

    Raises:
        ValueError: If `format_weight` is not a finite number >= 0, or `ground_truth` is `None`, empty or not finite.
            The message names the sample.
        TypeError: If `solution_str` or `ground_truth` is of a wrong type.

    Source: AVAR, arXiv 2603.03825 (visual-anchored reward, lambda_f = 0.1). Called by
    https://github.com/verl-project/verl/blob/v0.9.1/verl/experimental/reward_loop/reward_manager/naive.py

    Example:
        >>> compute_score("geo3k", "<think>2 + 2</think><answer>4</answer>", "4")
        {'score': 1.1, 'acc': 1.0, 'format': 1.0, 'pred_found': 1.0}
    """
    is_number = isinstance(format_weight, numbers.Real) and not isinstance(format_weight, bool)
    if not is_number or not math.isfinite(format_weight) or format_weight < 0:
        raise ValueError(
            f"format_weight must be a finite number >= 0; got {format_weight!r}. "
            "Set reward.custom_reward_function.reward_kwargs.format_weight, 0 to disable the format term."
        )
    accepted = accepted_answers(ground_truth, sample_name(data_source, extra_info))
    prediction = extract_answer(solution_str)
    acc = float(prediction is not None and grade_answer(prediction, accepted))
    layout = format_score(solution_str, think_in_prompt=think_in_prompt)
    return {
        "score": float(acc + format_weight * layout),
        "acc": acc,
        "format": layout,
        "pred_found": float(prediction is not None),
    }
