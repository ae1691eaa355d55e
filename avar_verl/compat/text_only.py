# SPDX-License-Identifier: Apache-2.0
"""Micro-batches without an image on Qwen2-VL and Qwen2.5-VL.

verl runs the vision tower on a dummy image for them, so that every rank takes part in its collectives
(verl/models/transformers/qwen2_vl.py:388-394). Since transformers 5 the tower returns an output object; the two other
branches unpack it, this one calls `.mean()` on it and dies with an AttributeError. Mixed data, and the text-only rows
with which verl pads a batch (trainer/ppo/padding_utils.py), get there. The wrapper sends the dummy image through the
branch that works.
"""

import functools

import torch

GRID = (1, 4, 4)  # verl's dummy image, in patches


def apply(qwen2_vl) -> None:
    """Wrap `_get_input_embeds` of the freshly imported module `verl.models.transformers.qwen2_vl`."""
    original = qwen2_vl._get_input_embeds

    @functools.wraps(original)
    def _get_input_embeds(model, input_ids, attention_mask=None, pixel_values=None, pixel_values_videos=None, *grids):
        if pixel_values is not None or pixel_values_videos is not None:
            return original(model, input_ids, attention_mask, pixel_values, pixel_values_videos, *grids)
        vision = model.config.vision_config
        num_patches = GRID[0] * GRID[1] * GRID[2]
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        dummy_embeds, _ = original(
            model,
            input_ids.new_full((1, num_patches // vision.spatial_merge_size**2), model.config.image_token_id),
            pixel_values=torch.zeros(num_patches, patch_dim, device=input_ids.device),
            image_grid_thw=torch.tensor([GRID], device=input_ids.device),
        )
        inputs_embeds = model.get_input_embeddings()(input_ids) + 0.0 * dummy_embeds.mean()
        return inputs_embeds, attention_mask

    qwen2_vl._get_input_embeds = _get_input_embeds
