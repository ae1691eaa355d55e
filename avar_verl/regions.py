# SPDX-License-Identifier: Apache-2.0
"""Image tokens of a region: which placeholders of an image lie in a box.

A processor resizes an image to a multiple of patch size times merge size ("smart resize"; 14 * 2 = 28 pixels for
Qwen2.5-VL, 16 * 2 = 32 for Qwen3-VL), cuts it into h x w patches and merges `merge` x `merge` of them into one token.
The placeholders follow row by row. Resizing stretches the whole image onto the grid of tokens, so token (r, c) of R x C
covers the rectangle from (c / C, r / R) to ((c + 1) / C, (r + 1) / R) of the image, in whatever size a box is given.

Shape suffixes: S = positions, R x C = rows and columns of tokens of an image
"""

from collections.abc import Sequence

import torch

Box = Sequence[float]
# What a data set may add to its samples: (S,) integers, 1 on the image tokens that guidance is about.
REGION_KEY = "image_region"


def tokens_in_box(
    box: Box, image_size: tuple[float, float], grid_hw: tuple[int, int], merge_size: int, min_overlap: float = 0.0
) -> torch.Tensor:
    """Which tokens of an image lie in a box, (R, C) bool, R = h / merge, C = w / merge.

    Args:
        box: (x1, y1, x2, y2), left, top, right and bottom edge.
        image_size: (width, height) in the unit of the box: pixels of the stored image or of the resized one, or
            (1000, 1000) for relative boxes.
        grid_hw: (h, w) patches of the image, the last two numbers of the processor's `image_grid_thw`.
        merge_size: patches of one token along each side.
        min_overlap: share of a token's area that the box must cover at least, in [0, 1]; 0 takes every token that the
            box touches with positive area.

    Raises:
        ValueError: an empty box or one outside the image, a grid that is no multiple of the merge size, or a
            `min_overlap` that no token reaches.

    >>> tokens_in_box((0, 0, 28, 56), (112, 112), (8, 8), 2).int().tolist()
    [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    """
    x1, y1, x2, y2 = box
    width, height = image_size
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ValueError(
            f"a box must be (x1, y1, x2, y2) with positive area inside the image; got {tuple(box)} in {image_size}. "
            "Give it in the unit of image_size."
        )
    if grid_hw[0] % merge_size or grid_hw[1] % merge_size:
        raise ValueError(
            f"the grid must be a multiple of the merge size; got {tuple(grid_hw)} and {merge_size}. Take both from the "
            "processor that made the sample."
        )

    def overlap(low: float, high: float, size: float, count: int) -> torch.Tensor:
        """Share of each of `count` equal cells of [0, size] that [low, high] covers."""
        edges = torch.arange(count + 1, dtype=torch.float64) * size / count
        return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * count / size

    rows, columns = grid_hw[0] // merge_size, grid_hw[1] // merge_size
    share_RC = overlap(y1, y2, height, rows)[:, None] * overlap(x1, x2, width, columns)[None]
    inside_RC = share_RC > 0 if min_overlap == 0 else share_RC >= min_overlap
    if not bool(inside_RC.any()):
        raise ValueError(
            f"a box must cover min_overlap of at least one token; got {tuple(box)} with at most "
            f"{float(share_RC.max()):.2f} of one, min_overlap={min_overlap}. Lower it."
        )
    return inside_RC


def image_region(
    input_ids_S: torch.Tensor,
    image_token_id: int,
    boxes: Sequence[Sequence[Box]],
    image_sizes: Sequence[tuple[float, float]],
    grids_thw: torch.Tensor,
    merge_size: int,
    min_overlap: float = 0.0,
) -> torch.Tensor:
    """Which positions of a sample are image tokens inside the boxes of their image, (S,) bool.

    Args:
        boxes: for every image its boxes; an image without boxes counts whole.
        image_sizes: for every image the (width, height) that its boxes refer to.
        grids_thw: (images, 3) of the processor; t must be 1.

    Raises:
        ValueError: another number of images, boxes or tokens than the grids have, a video, or a bad box.
    """
    grids = [tuple(grid) for grid in grids_thw.tolist()]
    if not len(grids) == len(boxes) == len(image_sizes):
        raise ValueError(
            f"every image needs a list of boxes and a size; got {len(grids)} images, {len(boxes)} lists of boxes and "
            f"{len(image_sizes)} sizes. Use an empty list for an image without boxes."
        )
    parts = []
    for (t, h, w), image_boxes, size in zip(grids, boxes, image_sizes, strict=True):
        if t != 1:
            raise ValueError(f"boxes refer to still images; got a grid of {t} frames. Leave videos out.")
        inside = torch.zeros(h // merge_size, w // merge_size, dtype=torch.bool)
        for box in image_boxes:
            inside |= tokens_in_box(box, size, (h, w), merge_size, min_overlap)
        parts.append(inside.flatten() if len(image_boxes) else torch.ones_like(inside).flatten())
    tokens = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
    is_image_S = input_ids_S == image_token_id
    if int(is_image_S.sum()) != len(tokens):
        raise ValueError(
            f"the sample must have one placeholder for every image token; got {int(is_image_S.sum())} for grids of "
            f"{len(tokens)}. Do not truncate samples with regions."
        )
    region_S = torch.zeros_like(is_image_S)
    region_S[is_image_S] = tokens.to(region_S.device)
    return region_S
