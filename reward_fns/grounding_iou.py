# SPDX-License-Identifier: Apache-2.0
"""Accuracy and grounding: boxes of the response against reference boxes.

reward.custom_reward_function.path=pkg://reward_fns.grounding_iou reward.custom_reward_function.name=compute_score
+reward.custom_reward_function.reward_kwargs.coordinates=absolute
"""

from avar_verl.rewards.compose import shipped_score


def compute_score(
    data_source,
    solution_str,
    ground_truth,
    extra_info=None,
    grounding_weight=0.5,
    gated=True,
    coordinates="auto",
    decimals="exact",
    **kwargs,
) -> dict[str, float]:
    """Score a response: `score = acc + grounding_weight * gate * grounding`.

    `grounding = sum of IoU over the best one-to-one matching / max(boxes of the response, reference boxes)`.

    Args:
        extra_info (`dict`):
            `boxes`, the reference boxes (x1, y1, x2, y2), [] for none, and `boxes_size`, the (width, height) they refer
            to; `image_sizes`, [(width, height)] of the image as the model saw it, which the reward manager `avar` adds.
        grounding_weight (`float`, *optional*, defaults to 0.5):
            Weight of the grounding, finite and >= 0; 0 disables it.
        gated (`bool`, *optional*, defaults to `True`):
            Pay for boxes only if the answer is right.
        coordinates (`str`, *optional*, defaults to `"auto"`):
            Coordinate system of the model's boxes, see `visual_anchor`. JSON boxes do not say theirs, so set it.
        decimals (`str`, *optional*, defaults to `"exact"`):
            `"ground_truth"` rounds the answer to the decimals of the ground truth.

    Returns:
        `dict[str, float]`: `score` in [0, 1 + grounding_weight]; `acc`, `pred_found`, `grounding` in [0, 1], and
        `num_boxes` of the response.

    Raises:
        ValueError: If the sample has no `boxes` or `boxes_size`, or its boxes are in an unknown coordinate system.

    Example:
        >>> info = {"boxes": [[0, 0, 100, 100]], "boxes_size": [200, 200]}
        >>> response = '<think>{"bbox_2d": [0, 0, 500, 250]}</think><answer>4</answer>'
        >>> compute_score("cups", response, "4", info, coordinates="relative_1000")["score"]
        1.25
    """
    gate = "acc" if gated else None
    boxes = {"weight": grounding_weight, "gate": gate, "settings": {"coordinates": coordinates}}
    acc = {"weight": 1.0, "settings": {"decimals": decimals}}
    return shipped_score(data_source, solution_str, ground_truth, extra_info, acc=acc, grounding=boxes)
