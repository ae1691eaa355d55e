# SPDX-License-Identifier: Apache-2.0
"""Any weighted combination of the shipped parts and your own functions, set in the config.

reward.custom_reward_function.path=pkg://reward_fns.compose reward.custom_reward_function.name=compute_score
'+reward.custom_reward_function.reward_kwargs.parts={acc:{weight:1.0},anchor:{weight:0.3,gate:acc}}'
"""

from avar_verl.rewards.compose import composed_score


def compute_score(data_source, solution_str, ground_truth, extra_info=None, parts=None, **kwargs) -> dict[str, float]:
    """Score a response: `score = sum of weight * gate * value` over `parts`, see `avar_verl.rewards.compose`.

    Args:
        parts (`Mapping[str, Mapping]`):
            For every part `weight`, and optionally `gate`, `settings` and `function`.

    Returns:
        `dict[str, float]`: `score` and every part.

    Raises:
        ValueError: If `parts` is missing or cannot be computed.

    Example:
        >>> parts = {"acc": {"weight": 1.0}, "anchor": {"weight": 0.3, "gate": "acc"}}
        >>> compute_score("geo3k", "<think>I look at the image.</think><answer>4</answer>", "4", parts=parts)["score"]
        1.0375
    """
    return composed_score(data_source, solution_str, ground_truth, extra_info, {} if parts is None else parts)
