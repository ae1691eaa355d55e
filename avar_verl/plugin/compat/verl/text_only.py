# SPDX-License-Identifier: Apache-2.0
"""Micro-batches without an image on Qwen2-VL and Qwen2.5-VL.

verl runs the vision tower on a dummy image for them, so that every rank takes part in its collectives
(verl/models/transformers/qwen2_vl.py:388-394). Since transformers 5 the tower returns an output object; the two other
branches unpack it, this one calls `.mean()` on it and dies with an AttributeError. Mixed data, and the text-only rows
with which verl pads a batch (trainer/ppo/padding_utils.py), get there.
"""

import functools

import torch

from avar_verl.plugin.compat.replace import replace

GRID = (1, 4, 4)  # verl's dummy image, in patches


def image_features(model, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """(image tokens, hidden size) of all images."""
    return torch.cat(list(model.get_image_features(pixel_values, grid_thw).pooler_output))


def embed_text(model, input_ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of ids without an image, plus zero times the features of a black one.

    Every module runs as often as with an image: under FSDP a second lookup of words would be a collective that the
    other ranks do not take part in.
    """
    embeds = model.get_input_embeddings()(input_ids)
    vision = model.config.vision_config
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    black = torch.zeros(GRID[0] * GRID[1] * GRID[2], patch_dim, device=embeds.device)
    features = image_features(model, black, torch.tensor([GRID], device=embeds.device))
    return embeds + 0.0 * features.mean().to(embeds.dtype)


def apply(qwen2_vl) -> None:
    """Wrap `_get_input_embeds` of `verl.models.transformers.qwen2_vl`."""
    original = qwen2_vl._get_input_embeds

    @functools.wraps(original)
    def _get_input_embeds(model, input_ids, attention_mask=None, pixel_values=None, pixel_values_videos=None, *grids):
        if pixel_values is not None or pixel_values_videos is not None:
            return original(model, input_ids, attention_mask, pixel_values, pixel_values_videos, *grids)
        return embed_text(model, input_ids), attention_mask

    replace(qwen2_vl, "_get_input_embeds", _get_input_embeds)
