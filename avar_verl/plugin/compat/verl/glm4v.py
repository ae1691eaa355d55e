# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V's image features under transformers 5.

verl's forward of the model calls `model.visual` and takes the answer for a tensor
(verl/models/transformers/glm4v.py:335-388). Since transformers 5 it is an output object, and every batch dies, with an
image ('no attribute shape') or without ('no attribute mean'). The function below asks the model itself for its image
features; a batch without an image sends a black one through the tower, as verl's function does, so that every rank
takes part in its collectives.
"""

import torch

from avar_verl.plugin.compat.replace import replace
from avar_verl.plugin.compat.verl.text_only import embed_text, image_features


def get_input_embeds(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    pixel_values_videos: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings of (B, S) ids with image features in the place of their placeholders.

    Raises:
        ValueError: a video, or another number of placeholders than features.
    """
    if pixel_values_videos is not None:
        raise ValueError("GLM-4.1V is trained on text and images; got a video. Leave such rows out.")
    if pixel_values is None:
        return embed_text(model, input_ids), attention_mask
    embeds = model.get_input_embeddings()(input_ids)
    features = image_features(model, pixel_values, image_grid_thw).to(embeds.device, embeds.dtype)
    is_image = input_ids == model.config.image_token_id
    if int(is_image.sum()) != len(features):
        raise ValueError(
            f"every image feature needs one placeholder; got {int(is_image.sum())} placeholders and {len(features)} "
            "features. Do not truncate prompts with images."
        )
    return embeds.masked_scatter(is_image[..., None], features), attention_mask


def apply(glm4v) -> None:
    """Replace `_get_input_embeds` of `verl.models.transformers.glm4v`."""
    replace(glm4v, "_get_input_embeds", get_input_embeds)


def apply_flops(flops_counter) -> None:
    """Count GLM-4.1V's operations by its text config (`verl.utils.flops_counter`).

    verl's function reads `hidden_size` off the config of the whole model, which has none (flops_counter.py:92-97), and
    the first step ends the run.
    """
    original = flops_counter.ESTIMATE_FUNC["glm4v"]

    def of_text(config, tokens_sum, batch_seqlens, delta_time):
        return original(config.get_text_config(), tokens_sum, batch_seqlens, delta_time)

    flops_counter.ESTIMATE_FUNC["glm4v"] = of_text
