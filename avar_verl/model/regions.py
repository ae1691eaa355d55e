# SPDX-License-Identifier: Apache-2.0
"""Image tokens of a region: which placeholders of an image are inside a box.

Every image token represents a rectangle of its image, its *place*: (x1, y1, x2, y2) as fractions of width and height.
The family defines it (`Family.places`). If a processor stretches the whole image onto R x C tokens, row by row, token
(r, c) covers (c / C, r / R) to ((c + 1) / C, (r + 1) / R); if it cuts tiles, each tile has such a grid. Places are
fractions, so boxes may be in pixels of the stored image, of the resized image, or in thousandths.

Shape suffixes: S = positions, N = tokens of an image
"""

from collections.abc import Sequence

import torch

Box = Sequence[float]
# A data set may add this to its samples: (S,) integers, 1 on the image tokens that guidance applies to.
REGION_KEY = "image_region"


def grid_places(rows: int, columns: int, inside: Box = (0.0, 0.0, 1.0, 1.0)) -> torch.Tensor:
    """Places (N, 4) of a grid of tokens, row by row, that covers the rectangle `inside`.

    >>> grid_places(1, 2).tolist()
    [[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]
    """
    left, top, right, bottom = inside
    x = left + (right - left) * torch.arange(columns + 1, dtype=torch.float64) / columns
    y = top + (bottom - top) * torch.arange(rows + 1, dtype=torch.float64) / rows
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row, column = row.flatten(), column.flatten()
    return torch.stack([x[column], y[row], x[column + 1], y[row + 1]], dim=1)


def merged_grid_places(grids_thw: torch.Tensor, merge_size: int) -> list[torch.Tensor]:
    """Places of images that a processor reports as (t, h, w) patches, `merge_size` squared patches per token (Qwen,
    GLM).

    Raises:
        ValueError: a video, or a grid that is not a multiple of the merge size.
    """
    places = []
    for t, h, w in grids_thw.tolist():
        if t != 1:
            raise ValueError(f"boxes refer to still images; got a grid of {t} frames. Leave videos out.")
        if h % merge_size or w % merge_size:
            raise ValueError(
                f"the grid must be a multiple of the merge size; got {(h, w)} and {merge_size}. Take both from the "
                "processor that made the sample."
            )
        places.append(grid_places(h // merge_size, w // merge_size))
    return places


def tokens_in_box(
    box: Box, image_size: tuple[float, float], places_N4: torch.Tensor, min_overlap: float = 0.0
) -> torch.Tensor:
    """Which tokens of an image are inside a box, (N,) bool.

    Args:
        box: (x1, y1, x2, y2), left, top, right and bottom edge.
        image_size: (width, height) in the unit of the box: pixels of the stored image or of the resized one, or
            (1000, 1000) for relative boxes.
        places_N4: places of the image's tokens.
        min_overlap: smallest fraction of a token's area that the box must cover, in [0, 1]; 0 takes every token that
            the box overlaps with positive area.

    Raises:
        ValueError: an empty box or one outside the image, or a `min_overlap` that no token reaches.

    >>> tokens_in_box((0, 0, 28, 56), (112, 112), grid_places(4, 4)).int().reshape(4, 4).tolist()
    [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    x1, y1, x2, y2 = box
    width, height = image_size
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ValueError(
            f"a box must be (x1, y1, x2, y2) with positive area inside the image; got {tuple(box)} in {image_size}. "
            "Give it in the unit of image_size."
        )
    # In the unit of the box, where its edges are exact: a token that the box only touches has no area in common.
    low_N2, high_N2 = (places_N4[:, i : i + 2] * torch.tensor([width, height], dtype=torch.float64) for i in (0, 2))
    common_N2 = high_N2.clamp(max=torch.tensor([x2, y2])) - low_N2.clamp(min=torch.tensor([x1, y1]))
    share_N = common_N2.clamp(min=0).prod(1) / (high_N2 - low_N2).prod(1)
    inside_N = share_N > 1e-12 if min_overlap == 0 else share_N >= min_overlap - 1e-12
    if not bool(inside_N.any()):
        raise ValueError(
            f"a box must cover min_overlap of at least one token; got {tuple(box)} with at most "
            f"{float(share_N.max()):.2f} of one, min_overlap={min_overlap}. Lower it."
        )
    return inside_N


def image_region(
    input_ids_S: torch.Tensor,
    image_token_ids: Sequence[int],
    boxes: Sequence[Sequence[Box]],
    image_sizes: Sequence[tuple[float, float]],
    places: Sequence[torch.Tensor],
    min_overlap: float = 0.0,
) -> torch.Tensor:
    """Which positions of a sample are image tokens inside the boxes of their image, (S,) bool.

    Args:
        image_token_ids: ids of the placeholders.
        boxes: for every image its boxes; an image without boxes counts as a whole.
        image_sizes: for every image the (width, height) that its boxes refer to.
        places: for every image the places of its tokens, in the order of the placeholders.

    Raises:
        ValueError: the numbers of images, lists of boxes, tokens and places do not match, or a box is invalid.
    """
    if not len(places) == len(boxes) == len(image_sizes):
        raise ValueError(
            f"every image needs a list of boxes and a size; got {len(places)} images, {len(boxes)} lists of boxes and "
            f"{len(image_sizes)} sizes. Use an empty list for an image without boxes."
        )
    parts = []
    for places_N4, image_boxes, size in zip(places, boxes, image_sizes, strict=True):
        inside_N = torch.full((len(places_N4),), not len(image_boxes))
        for box in image_boxes:
            inside_N |= tokens_in_box(box, size, places_N4, min_overlap)
        parts.append(inside_N)
    tokens = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
    is_image_S = torch.isin(input_ids_S, input_ids_S.new_tensor(list(image_token_ids)))
    if int(is_image_S.sum()) != len(tokens):
        raise ValueError(
            f"the sample must have one placeholder for every image token; got {int(is_image_S.sum())} for places of "
            f"{len(tokens)}. Do not truncate samples with regions."
        )
    region_S = torch.zeros_like(is_image_S)
    region_S[is_image_S] = tokens.to(region_S.device)
    return region_S
