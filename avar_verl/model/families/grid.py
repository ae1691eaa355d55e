# SPDX-License-Identifier: Apache-2.0
"""Places of image tokens in families that report a grid of patches for every image."""

import torch

from avar_verl.model.regions import merged_grid_places


def grid_thw_places(processor, features: dict, image_sizes: list | None) -> list[torch.Tensor]:
    """See `Family.places`."""
    return merged_grid_places(features["image_grid_thw"], processor.image_processor.merge_size)
