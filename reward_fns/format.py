# SPDX-License-Identifier: Apache-2.0
"""Format alone as a verl reward function, with the accuracy beside it for the log and for VARS's gate.

reward.custom_reward_function.path=pkg://reward_fns.format reward.custom_reward_function.name=compute_score
"""

from __future__ import annotations

from typing import Any

from avar_verl.rewards.compose import composed_score


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict | None = None,
    think_in_prompt: bool = False,
    **kwargs: Any,
) -> dict[str, float]:
    """Score a response: `score = format`, 1 for one `<think>` block and then one `<answer>` block, else 0.

    Args:
        data_source, solution_str, ground_truth, extra_info:
            As verl passes them.
        think_in_prompt (`bool`, *optional*, defaults to `False`):
            Whether the prompt ends with `<think>`, see `avar_verl.rewards.format.format_score`.
        kwargs:
            What verl passes beyond that; not used.

    Returns:
        `dict[str, float]`: the same keys for every sample, all in {0, 1}. `score`; `format`; `acc` and `pred_found`,
        which are not paid for.

    Raises:
        ValueError: If `ground_truth` is `None`, empty or not finite; the message names the sample.

    Example:
        >>> compute_score("geo3k", "<think>2 + 2</think><answer>5</answer>", "4")["score"]
        1.0
    """
    parts = {
        "acc": {"weight": 0.0},
        "format": {"weight": 1.0, "settings": {"think_in_prompt": think_in_prompt}},
    }
    return composed_score(data_source, solution_str, ground_truth, extra_info, parts)
