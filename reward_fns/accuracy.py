# SPDX-License-Identifier: Apache-2.0
"""Accuracy only.

reward.custom_reward_function.path=pkg://reward_fns.accuracy reward.custom_reward_function.name=compute_score
"""

from avar_verl.rewards.compose import shipped_score


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, decimals="exact", **kwargs
) -> dict[str, float]:
    """Score a response: `score = acc`.

    Args:
        decimals (`str`, *optional*, defaults to `"exact"`):
            `"ground_truth"` rounds the answer to the decimals of the ground truth.

    Returns:
        `dict[str, float]`: `score`; `acc`, 1 if the answer is right; `pred_found`; all in {0, 1}.

    Source: r_accuracy of AVAR, arXiv 2603.03825 (visual-anchored reward).

    Example:
        >>> compute_score("geo3k", "<think>2 + 2</think><answer>4</answer>", "4")
        {'score': 1.0, 'acc': 1.0, 'pred_found': 1.0}
    """
    acc = {"weight": 1.0, "settings": {"decimals": decimals}}
    return shipped_score(data_source, solution_str, ground_truth, extra_info, acc=acc)
