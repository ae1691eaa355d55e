# SPDX-License-Identifier: Apache-2.0
"""Accuracy and format: the text part of the AVAR reward.

reward.custom_reward_function.path=pkg://reward_fns.avar reward.custom_reward_function.name=compute_score
+reward.custom_reward_function.reward_kwargs.format_weight=0.1
"""

from avar_verl.rewards.compose import shipped_score


def compute_score(
    data_source,
    solution_str,
    ground_truth,
    extra_info=None,
    format_weight=0.1,
    think_in_prompt=False,
    decimals="exact",
    **kwargs,
) -> dict[str, float]:
    """Score a response: `score = acc + format_weight * format`.

    The paper's `r_total = r_accuracy + lambda_v * r_visual + lambda_f * r_format` with `lambda_f = 0.1`, without
    `r_visual`: that one needs attention, which a reward function does not see, so the trainer adds it.

    Args:
        format_weight (`float`, *optional*, defaults to `0.1`):
            lambda_f, finite and >= 0. 0 disables the format term; `format` is still reported.
        think_in_prompt (`bool`, *optional*, defaults to `False`):
            Whether the prompt ends with `<think>`, see `avar_verl.rewards.format.format_score`.
        decimals (`str`, *optional*, defaults to `"exact"`):
            `"ground_truth"` rounds the answer to the decimals of the ground truth.

    Returns:
        `dict[str, float]`: `score` in [0, 1 + format_weight]; in {0, 1}: `acc`, `pred_found`, and `format`, 1 if the
        layout is right.

    Source: AVAR, arXiv 2603.03825 (visual-anchored reward, lambda_f = 0.1).

    Example:
        >>> compute_score("geo3k", "<think>2 + 2</think><answer>4</answer>", "4")
        {'score': 1.1, 'acc': 1.0, 'pred_found': 1.0, 'format': 1.0}
    """
    layout = {"weight": format_weight, "settings": {"think_in_prompt": think_in_prompt}}
    acc = {"weight": 1.0, "settings": {"decimals": decimals}}
    return shipped_score(data_source, solution_str, ground_truth, extra_info, acc=acc, format=layout)
