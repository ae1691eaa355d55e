# SPDX-License-Identifier: Apache-2.0
"""Mistral Small 3.1 and later, and Ministral 3. The system turn, `[SYSTEM_PROMPT]` to its end, follows `<s>`.

`[IMG_BREAK]` after each row of an image and `[IMG_END]` after the last keep the role of their turn.
"""

import torch

from avar_verl.model.family import Family
from avar_verl.model.regions import grid_places
from avar_verl.model.turns import TurnFormat

TURNS = TurnFormat(
    system=("<s>",),
    user=("[INST]",),
    assistant=("[/INST]",),
    tokens=("<s>", "[INST]", "[/INST]"),
    ends=("</s>",),
)


def places(processor, features: dict, image_sizes: list | None) -> list[torch.Tensor]:
    """A whole image is one grid of tokens, each of a square of merged patches."""
    side = processor.patch_size * processor.spatial_merge_size
    return [grid_places(height // side, width // side) for height, width in features["image_sizes"].tolist()]


def count_positions(model: torch.nn.Module) -> None:
    """Count the positions of a padded batch from each sample's own start.

    Transformers counts them from the start of the row, padding included. Rotation does not mind, but Ministral 3 scales
    queries by their position (models/ministral3/modeling_ministral3.py, `get_llama_4_attn_scale`), so that the result
    for a sample would depend on the padding on its left.
    """

    def count(_decoder, args, kwargs):
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        is_first = cache is None or int(cache.get_seq_length()) == 0
        if kwargs.get("position_ids") is not None or not is_first or mask is None or mask.dim() != 2:
            return args, kwargs
        return args, {**kwargs, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}

    model.get_submodule("model.language_model").register_forward_pre_hook(count, with_kwargs=True)


FAMILY = Family(
    model_types=("mistral3",),
    turns=TURNS,
    system="everything before the first user turn, at least `<s>`",
    placeholders=("image_token_index", "image_token_id"),
    vision_tower="model.vision_tower",
    projectors=("model.multi_modal_projector",),
    places=places,
    prepare=count_positions,
    unpackable="its attention does not tell the capture where packed samples start",
)
