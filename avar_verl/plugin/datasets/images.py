# SPDX-License-Identifier: Apache-2.0
"""Images in the sides that verl's trainers see."""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from verl.utils.dataset.vision_utils import process_image

from avar_verl.data.images import KEYS


def resized(value: Any, image: Image.Image, patch_size: int) -> Image.Image:
    """`image`, opened from `value`, as verl resizes it before the processor does.

    Args:
        value: as stored; where it is a mapping, limits such as `min_pixels` may stand beside the image (docs/data.md).
        patch_size: of the image processor.
    """
    limits = {key: item for key, item in value.items() if key not in KEYS} if isinstance(value, Mapping) else {}
    return process_image({**limits, "image": image}, image_patch_size=patch_size)
