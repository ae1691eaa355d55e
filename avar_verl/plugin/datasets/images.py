# SPDX-License-Identifier: Apache-2.0
"""Images in the size that verl's trainers see."""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from verl.utils.dataset.vision_utils import process_image

from avar_verl.data.images import KEYS, open_image


def patch_size_of(processor) -> int:
    """Patch size of a processor for `process_image`; 14 if it has none, as in verl's data sets."""
    return getattr(processor.image_processor, "patch_size", None) or 14


def resized(value: Any, image: Image.Image, patch_size: int) -> Image.Image:
    """`image`, opened from `value`, as verl resizes it before the processor does.

    Args:
        value: as stored; a mapping may have limits such as `min_pixels` in addition to the image (docs/data.md).
        patch_size: see `patch_size_of`.
    """
    limits = {key: item for key, item in value.items() if key not in KEYS} if isinstance(value, Mapping) else {}
    return process_image({**limits, "image": image}, image_patch_size=patch_size)


def open_resized(value: Any, patch_size: int, *, allow_urls: bool = False) -> Image.Image:
    """The image of a row's value as the trainers see it.

    Raises:
        ValueError: anything that `open_image` refuses.
    """
    return resized(value, open_image(value, allow_urls=allow_urls), patch_size)
