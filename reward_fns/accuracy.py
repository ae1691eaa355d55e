# SPDX-License-Identifier: Apache-2.0
"""Accuracy alone as a verl reward function.

reward.custom_reward_function.path=pkg://reward_fns.accuracy reward.custom_reward_function.name=compute_score
"""

from __future__ import annotations

from typing import Any

from avar_verl.rewards.accuracy import accepted_answers, extract_answer, grade_answer, sample_name


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None, **kwargs: Any
) -> dict[str, float]:
    """Score a response: `score = acc`.

    Args:
        data_source (`str`):
            Name of the data set, used in error messages only.
        solution_str (`str`):
            Decoded response, without the prompt.
        ground_truth (`str`, number, or `list` of these):
            Accepted answer or answers.
        extra_info (`dict`, *optional*):
            Further columns of the sample; `index` is used in error messages only.
        kwargs:
            What verl passes beyond that (such as `reward_router_address`); not used.

    Returns:
        `dict[str, float]`: the same keys for every sample, all in {0, 1}. `score`; `acc`, 1 if the answer is right;
        `pred_found`, 1 if the response has an answer at all.

    Raises:
        ValueError: If `ground_truth` is `None`, empty or not finite; the message names the sample.
        TypeError: If `solution_str` or `ground_truth` is of a wrong type.

    Source: r_accuracy of AVAR, arXiv 2603.03825 (visual-anchored reward). Called by
    https://github.com/verl-project/verl/blob/v0.9.1/verl/experimental/reward_loop/reward_manager/naive.py

    Example:
        >>> compute_score("geo3k", "<think>2 + 2</think><answer>4</answer>", "4")
        {'score': 1.0, 'acc': 1.0, 'pred_found': 1.0}
    """
    accepted = accepted_answers(ground_truth, sample_name(data_source, extra_info))
    prediction = extract_answer(solution_str)
    acc = float(prediction is not None and grade_answer(prediction, accepted))
    return {"score": acc, "acc": acc, "pred_found": float(prediction is not None)}
