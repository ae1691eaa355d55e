# SPDX-License-Identifier: Apache-2.0
"""Gemma 3. An image is a square of 256 tokens; tokens of one image see each other in both directions.

The chat template folds the system message into the first user turn, where ids do not distinguish them. So the text of a
system message is USER, and SYSTEM is `<bos>`, the attention sink before the first turn.
"""

import math

import torch

from avar_verl.model.family import Family
from avar_verl.model.regions import grid_places
from avar_verl.model.turns import TurnFormat

TURNS = TurnFormat(
    system=("<bos>",),
    user=("<start_of_turn>user",),
    assistant=("<start_of_turn>model",),
    other=("<start_of_turn>",),
    header_tail=1,
    tokens=("<bos>", "<start_of_turn>"),
    ends=("<end_of_turn>",),
    trailing="\n",
)


def token_inputs(config, ids_BS: torch.Tensor, features: dict) -> dict[str, torch.Tensor]:
    """`token_type_ids`, 1 on image tokens, which see each other within an image."""
    return {"token_type_ids": (ids_BS == config.image_token_id).long()}


def places(processor, features: dict, image_sizes: list | None) -> list[torch.Tensor]:
    """Every image is stretched to a square of `image_seq_length` tokens. With pan and scan an image has several crops,
    which the features do not distinguish; then the number of images does not match, which is an error.
    """
    side = math.isqrt(processor.image_seq_length)
    return [grid_places(side, side) for _ in features["pixel_values"]]


FAMILY = Family(
    model_types=("gemma3",),
    turns=TURNS,
    system="`<bos>`, the attention sink; a system message is part of the first user turn",
    placeholders=("image_token_id",),
    vision_tower="model.vision_tower",
    projectors=("model.multi_modal_projector",),
    token_inputs=token_inputs,
    places=places,
    no_flash=lambda text_config: "its mask is causal, and tokens of one image see each other",
    unpackable="image tokens of one image see each other, through a mask that does not support packed samples",
)
