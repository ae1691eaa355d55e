# SPDX-License-Identifier: Apache-2.0
"""Corrupted images: the features of an image without its content, of the same sizes.

`blank` is a picture of the processor's mean colour, `swap` the image of another sample. Both leave ids, grids, sizes
and masks as they are, so a corrupted sample has the same tokens at the same positions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Features = Mapping[str, torch.Tensor | None]
# What the processors of the known families, and verl, name the features of images: those that hold pixels, and those
# that say how the pixels are laid out.
PIXELS = ("pixel_values", "pixel_values_videos")
GEOMETRY = (
    *("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "images_seqlens"),  # Qwen-VL, GLM-4.1V
    *("image_sizes", "batch_num_images"),  # LLaVA
    *("pixel_attention_mask", "spatial_shapes"),  # Idefics3, SmolVLM, LFM2-VL
    *("aspect_ratio_ids", "aspect_ratio_mask"),  # Llama 3.2 Vision
    "image_position_ids",  # Gemma 4
    *("target_sizes", "target_sizes_videos"),  # MiniCPM-V
)
# Idefics3 and SmolVLM take a tile of nothing but 0 for padding and drop it (modeling_idefics3.py:586 in transformers
# 5.9), so a blank tile of theirs has the smallest normal number of float16, far less than a level of colour.
NEARLY_ZERO = 2.0**-14


def _is_pixels(key: str) -> bool:
    if key not in PIXELS and key not in GEOMETRY:
        raise ValueError(
            f"an image can be corrupted if every feature is known to be pixels or not; got {key!r}. Add it to PIXELS "
            "or GEOMETRY of avar_verl/model/corrupt.py."
        )
    return key in PIXELS


# Gemma 4's model normalises pixels of [0, 1] itself (modeling_gemma4.py:603 in transformers 5.9); this becomes 0.
UNNORMALISED = {"image_position_ids": 0.5}


def check_blank(processor: Any) -> None:
    """Refuse processors for which the mean colour is not known.

    Raises:
        ValueError: an image processor that does not normalise, of no model that is known to do so itself.
    """
    known = set(getattr(processor.image_processor, "model_input_names", ())) & set(UNNORMALISED)
    if not processor.image_processor.do_normalize and not known:
        raise ValueError(
            "a blank image is 0 in every pixel, which is the mean colour after normalisation; got an image processor "
            f"with do_normalize={processor.image_processor.do_normalize}. Corrupt images by swapping them "
            "(corruption=swap)."
        )


def blank(features: Features) -> dict[str, torch.Tensor | None]:
    """The features with every pixel 0, which after normalisation is the mean colour (`check_blank`).

    In families that drop tiles of 0, a pixel that `pixel_attention_mask` shows is NEARLY_ZERO instead; where the model
    normalises, a pixel of a patch with a position is UNNORMALISED.

    Padding is 0 too, where LLaVA and Llama 3.2 Vision pad a picture with black before they normalise it: which pixels
    are padding says nothing about the picture but its shape, and LLaVA drops their features.

    Raises:
        ValueError: a feature that is not known to be pixels or geometry.

    >>> blank({"pixel_values": torch.ones(1, 2), "image_grid_thw": torch.tensor([[1, 2, 2]])})
    {'pixel_values': tensor([[0., 0.]]), 'image_grid_thw': tensor([[1, 2, 2]])}
    """
    mask = features.get("pixel_attention_mask")
    positions = features.get("image_position_ids")

    def blanked(pixels: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros_like(pixels)
        if positions is not None:
            return zeros.masked_fill((positions >= 0).all(-1, keepdim=True), UNNORMALISED["image_position_ids"])
        if mask is None or mask.dim() == 2:  # Of patches (LFM2-VL), none of which is dropped for its pixels.
            return zeros
        return zeros.masked_fill(mask.bool().unsqueeze(-3), NEARLY_ZERO)

    return {key: blanked(value) if _is_pixels(key) and value is not None else value for key, value in features.items()}


def has_pixels(features: Features) -> bool:
    """Whether there is anything to corrupt."""
    return any(_is_pixels(key) and value is not None for key, value in features.items())


def shape_of(features: Features) -> tuple:
    """What two samples must share to swap their images: shapes of the pixels, values of everything else. Hashable.

    () for a sample without an image.

    Raises:
        ValueError: a feature that is not known to be pixels or geometry.
    """
    return tuple(
        (key, tuple(value.shape), () if _is_pixels(key) else tuple(value.flatten().tolist()))
        for key, value in sorted(features.items())
        if value is not None
    )


def swap(features: Features, partner: Features) -> dict[str, torch.Tensor | None]:
    """The features with the pixels of another sample's images.

    Raises:
        ValueError: images of other shapes, or a feature that is not known to be pixels or geometry.
    """
    if shape_of(features) != shape_of(partner):
        sizes = [
            {key: tuple(value.shape) for key, value in own.items() if value is not None} for own in (features, partner)
        ]
        raise ValueError(
            f"images that are swapped must have the same shapes and grids; got {sizes[0]} and {sizes[1]}. Use images "
            "of one size, or corruption=blank."
        )
    return {key: partner.get(key) if _is_pixels(key) else value for key, value in features.items()}


def first_rows(features: Features, rows: Mapping[str, int] | None) -> dict[str, torch.Tensor | None]:
    """The features of a sample's first images: the first `rows[key]` rows of each feature in `rows`; None means all.

    >>> first_rows({"image_grid_thw": torch.tensor([[1, 2, 2], [1, 4, 4]])}, {"image_grid_thw": 1})
    {'image_grid_thw': tensor([[1, 2, 2]])}
    """
    if rows is None:
        return dict(features)
    return {key: value[: rows[key]] for key, value in features.items() if value is not None and key in rows}


def with_first_rows(features: Features, first: Features) -> dict[str, torch.Tensor | None]:
    """The features of a sample whose first images are those of `first`, as `first_rows` returns them."""
    own = {key: value for key, value in first.items() if value is not None}
    return {
        key: torch.cat([own[key], value[len(own[key]) :]]) if value is not None and key in own else value
        for key, value in features.items()
    }


def _digest(features: Features) -> bytes:
    """Of the pixels."""
    digest = hashlib.sha256()
    for key, value in sorted(features.items()):
        if _is_pixels(key) and value is not None:
            digest.update(value.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def partners(samples: Sequence[Features]) -> list[int | None]:
    """For every sample the index of the one whose images it is swapped with; None for a sample without an image.

    Among images of one shape, everyone gets the next one in the order of the digests of their pixels, the last one the
    first. So it depends on the set of images alone, not on their order, and equal images are not swapped for each
    other.

    Raises:
        ValueError: a sample whose images are the only ones of their shape.
    """
    groups: dict[tuple, dict[bytes, int]] = {}
    keys = [(shape_of(features), _digest(features)) if has_pixels(features) else None for features in samples]
    for index, key in enumerate(keys):
        if key is not None:
            groups.setdefault(key[0], {}).setdefault(key[1], index)
    following: dict[tuple, dict[bytes, int]] = {}
    for shape, group in groups.items():
        order = sorted(group)
        following[shape] = {own: group[other] for own, other in zip(order, order[1:] + order[:1], strict=True)}
    out: list[int | None] = []
    for index, key in enumerate(keys):
        if key is None:
            out.append(None)
            continue
        shape, digest = key
        if len(following[shape]) == 1:
            raise ValueError(
                "an image is swapped for another one of the same size in its batch; got only one of the shapes "
                f"{ {name: tuple(v.shape) for name, v in samples[index].items() if v is not None} } among "
                f"{len(samples)} prompts. Set avar.vars.corruption=blank, or use images of one size."
            )
        out.append(following[shape][digest])
    return out
