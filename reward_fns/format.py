# SPDX-License-Identifier: Apache-2.0
"""Format only; accuracy is reported for the log and for the gate of VARS.

reward.custom_reward_function.path=pkg://reward_fns.format reward.custom_reward_function.name=compute_score
"""

from avar_verl.rewards.compose import shipped_score


def compute_score(
    data_source, solution_str, ground_truth, extra_info=None, think_in_prompt=False, decimals="exact", **kwargs
) -> dict[str, float]:
    """Score a response: `score = format`, 1 for one `<think>` block and then one `<answer>` block, else 0.

    Args:
        think_in_prompt (`bool`, *optional*, defaults to `False`):
            Whether the prompt ends with `<think>`, see `avar_verl.rewards.format.format_score`.
        decimals (`str`, *optional*, defaults to `"exact"`):
            `"ground_truth"` rounds the answer to the decimals of the ground truth.

    Returns:
        `dict[str, float]`: `score`; `format`; `acc` and `pred_found`, which are not rewarded; all in {0, 1}.

    Example:
        >>> compute_score("geo3k", "<think>2 + 2</think><answer>5</answer>", "4")["score"]
        1.0
    """
    layout = {"weight": 1.0, "settings": {"think_in_prompt": think_in_prompt}}
    acc = {"weight": 0.0, "settings": {"decimals": decimals}}
    return shipped_score(data_source, solution_str, ground_truth, extra_info, acc=acc, format=layout)
