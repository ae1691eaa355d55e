# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.6. The decoder is that of Qwen3.5: only every fourth layer has a softmax.

An image is seen as a whole and, if it is large, in slices of a grid. A generation prompt ends in an empty thinking
block or, with `enable_thinking=True`, in `<think>`.
"""

import math
from itertools import islice

import torch

from avar_verl.model.family import Family
from avar_verl.model.regions import grid_places
from avar_verl.model.turns import CHATML


def places(processor, features: dict, image_sizes: list | None) -> list[torch.Tensor]:
    """Of every image the whole, then its slices, row by row; each is a grid of tokens.

    Raises:
        ValueError: without `image_sizes`, from which the processor chooses the slices.
    """
    if image_sizes is None:
        raise ValueError(
            "boxes on MiniCPM-V's slices need the sizes of the images that the processor saw; got none. Use regions in "
            "the cold start (plugin.datasets.region); avar.vars.region does not have them."
        )
    settings, side = processor.image_processor, math.isqrt(processor.image_token_divisor)
    parts = iter((features["target_sizes"] // side).tolist())
    out = []
    for width, height in image_sizes:
        grid = None
        if settings.slice_mode:
            grid = settings.get_sliced_grid((height, width), settings.max_slice_nums, settings.scale_resolution)
        rows, columns = grid or (0, 0)
        boxes = [(0.0, 0.0, 1.0, 1.0)]
        boxes += [
            (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)
        ]
        out.append(
            torch.cat([grid_places(h, w, box) for (h, w), box in zip(islice(parts, len(boxes)), boxes, strict=True)])
        )
    return out


FAMILY = Family(
    model_types=("minicpmv4_6",),
    turns=CHATML,
    system="the system turn; the chat template adds none, so give every prompt one",
    placeholders=("image_token_id", "video_token_id"),
    vision_tower="model.vision_tower",
    projectors=("model.merger",),
    places=places,
    row_features=("pixel_values",),
    leaks_packed=True,
    unpackable="gated DeltaNet would go on from the state of the sample before: verl says where samples start in "
    "Qwen3.5 only",
)
