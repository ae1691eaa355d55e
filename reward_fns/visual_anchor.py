# SPDX-License-Identifier: Apache-2.0
"""Accuracy, format and visual anchors: a reward for reasoning that keeps referring to the image.

reward.custom_reward_function.path=pkg://reward_fns.visual_anchor reward.custom_reward_function.name=compute_score
+reward.custom_reward_function.reward_kwargs.coordinates=absolute
"""

from avar_verl.rewards.compose import shipped_score


def compute_score(
    data_source,
    solution_str,
    ground_truth,
    extra_info=None,
    anchor_weight=0.3,
    format_weight=0.1,
    gated=True,
    coordinates="auto",
    think_in_prompt=False,
    decimals="exact",
    **kwargs,
) -> dict[str, float]:
    """Score a response: `score = acc + format_weight * format + anchor_weight * gate * anchor`.

    `anchor = min(1, sum over the four quarters of the reasoning of the best new reference in it / 1.5)`, where a box or
    point counts 1 and a phrase 0.5; long lists earn less (`avar_verl.rewards.anchors`). For exploits see
    docs/reward-hacking.md.

    Args:
        solution_str (`str`):
            Decoded response. Formats of special tokens (`<|box_start|>`) survive decoding only with
            `avar.reward.skip_special_tokens=false`.
        extra_info (`dict`, *optional*):
            `image_sizes`, [(width, height)] of the images as the model saw them, for range checks, and `prompt_text`,
            whose wording is not rewarded; the reward manager `avar` adds both.
        anchor_weight (`float`, *optional*, defaults to 0.3):
            Weight of the anchors, finite and >= 0; 0 disables them, but they are still reported.
        format_weight (`float`, *optional*, defaults to 0.1):
            Weight of the format, finite and >= 0; 0 disables it.
        gated (`bool`, *optional*, defaults to `True`):
            Pay for anchors only if the answer is right.
        coordinates (`str`, *optional*, defaults to `"auto"`):
            Coordinate system of the model's boxes: `auto`, `absolute` (Qwen2.5-VL), `relative_1000` (Qwen3-VL),
            `normalized`, `percent`.
        think_in_prompt (`bool`, *optional*, defaults to `False`):
            Whether the prompt ends with `<think>`.
        decimals (`str`, *optional*, defaults to `"exact"`):
            `"ground_truth"` rounds the answer to the decimals of the ground truth.

    Returns:
        `dict[str, float]`: `score` in [0, 1 + format_weight + anchor_weight]; `acc`, `format`, `anchor` in [0, 1],
        `pred_found`, and the numbers of anchors `num_anchors`, `num_distinct_anchors`, `num_coordinate_anchors`.

    Raises:
        ValueError: If a weight is out of range, `coordinates` is unknown or `ground_truth` is `None` or empty.

    Example:
        >>> response = "<think>In the image there is a cup at [40, 60, 90, 120].</think><answer>4</answer>"
        >>> result = compute_score("geo3k", response, "4")
        >>> result["anchor"], round(result["score"], 4)  # a phrase in the first quarter, a box in the third
        (1.0, 1.4)
    """
    settings = {"coordinates": coordinates, "think_in_prompt": think_in_prompt}
    parts = {
        "acc": {"weight": 1.0, "settings": {"decimals": decimals}},
        "format": {"weight": format_weight, "settings": {"think_in_prompt": think_in_prompt}},
        "anchor": {"weight": anchor_weight, "gate": "acc" if gated else None, "settings": settings},
    }
    return shipped_score(data_source, solution_str, ground_truth, extra_info, **parts)
