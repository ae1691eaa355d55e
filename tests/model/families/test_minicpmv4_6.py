# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.6: what its tokens represent, and batches of its one row of patches."""

import pytest
import torch
from PIL import Image

from avar_verl.model.families import get_family
from avar_verl.model.render import merge_features, render

FAMILY = get_family("minicpmv4_6")


def features_of(processor, *images) -> dict:
    blocks = [{"type": "image", "image": image} for image in images]
    return render(processor, [{"role": "user", "content": [*blocks, {"type": "text", "text": "What?"}]}]).features


def corner(width: int, height: int) -> Image.Image:
    """Black, but for a white quarter at the top right."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), (width // 2, 0, width, height // 2))
    return image


def brightness(features: dict, side: int = 4) -> torch.Tensor:
    """Mean of every token's patches, in the order of the tokens: `side` squared patches of a part, row by row."""
    count = int(features["target_sizes"].prod(1).sum())
    patch_P = features["pixel_values"][0].unflatten(-1, (count, -1)).mean((0, 1, 3))
    parts = patch_P.split(features["target_sizes"].prod(1).tolist())
    grids = [part.view(h, w) for part, (h, w) in zip(parts, features["target_sizes"].tolist(), strict=True)]
    return torch.cat([grid.unfold(0, side, side).unfold(1, side, side).mean((2, 3)).flatten() for grid in grids])


@pytest.mark.parametrize("size, parts", [((112, 112), 1), ((224, 112), 3), ((112, 224), 3), ((224, 224), 5)])
def test_places_are_where_the_pixels_are(size, parts, family_processor):
    """Of the whole image, then of its slices."""
    processor = family_processor("minicpmv4_6")
    features = features_of(processor, corner(*size))
    assert len(features["target_sizes"]) == parts
    [places_N4] = FAMILY.image_places(processor, features, [size])
    x_N, y_N = places_N4[:, 0::2].mean(1), places_N4[:, 1::2].mean(1)
    bright_N = brightness(features)
    inside_N = (x_N > 0.5) & (y_N < 0.5)
    clear_N = ((x_N - 0.5).abs() > 0.13) & ((y_N - 0.5).abs() > 0.13)  # No token on the edge.
    assert len(places_N4) == len(bright_N) and bool((clear_N & inside_N).any())
    assert bool((bright_N[clear_N & inside_N] > 0.5).all()) and bool((bright_N[clear_N & ~inside_N] < -0.5).all())


def test_places_of_several_images_are_told_apart_by_their_sizes(family_processor):
    processor = family_processor("minicpmv4_6")
    sizes = [(224, 112), (112, 112)]
    together = FAMILY.image_places(processor, features_of(processor, *(corner(*size) for size in sizes)), sizes)
    for size, places_N4 in zip(sizes, together, strict=True):
        assert torch.equal(FAMILY.image_places(processor, features_of(processor, corner(*size)), [size])[0], places_N4)
    with pytest.raises(ValueError, match="boxes on MiniCPM-V's slices need the sizes of the images"):
        FAMILY.image_places(processor, features_of(processor, corner(112, 112)))


def test_patches_of_a_batch_are_one_row(family_processor):
    processor = family_processor("minicpmv4_6")
    one, other = corner(112, 112), corner(224, 112)
    merged = merge_features(FAMILY, [features_of(processor, one), None, features_of(processor, other)])
    both = features_of(processor, one, other)
    assert merged.keys() == both.keys() and all(torch.equal(value, both[key]) for key, value in merged.items())
