# SPDX-License-Identifier: Apache-2.0
"""InternVL in its Hugging Face form (InternVL2.5-hf, InternVL3-hf, InternVL3.5-HF).

An image is cut into square tiles of a canvas that fits its shape. If there are several tiles, a thumbnail of the whole
image follows. `<img>` and `</img>` around the placeholders keep the role of their turn.
"""

import math

import torch

from avar_verl.model.family import Family
from avar_verl.model.regions import grid_places
from avar_verl.model.turns import CHATML


def places(processor, features: dict, image_sizes: list | None) -> list[torch.Tensor]:
    """Tiles of the canvas, row by row, then the thumbnail if there is more than one tile.

    Raises:
        ValueError: without `image_sizes`, from which the processor chooses the canvas.
    """
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    if image_sizes is None:
        raise ValueError(
            "boxes on InternVL's tiles need the sizes of the images that the processor saw; got none. Use regions in "
            "the cold start (plugin.datasets.region); avar.vars.region does not have them."
        )
    settings, side = processor.image_processor, math.isqrt(processor.image_seq_length)
    tile = (settings.size["height"], settings.size["width"])
    out = []
    for width, height in image_sizes:
        columns, rows = 1, 1
        if settings.crop_to_patches:
            columns, rows = get_optimal_tiled_canvas((height, width), tile, settings.min_patches, settings.max_patches)
        boxes = [
            (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)
        ]
        if len(boxes) > 1:
            boxes.append((0.0, 0.0, 1.0, 1.0))
        out.append(torch.cat([grid_places(side, side, box) for box in boxes]))
    return out


FAMILY = Family(
    model_types=("internvl",),
    turns=CHATML,
    system="the system turn; the chat template adds none, so give every prompt one",
    placeholders=("image_token_id",),
    vision_tower="model.vision_tower",
    projectors=("model.multi_modal_projector",),
    coordinates="relative_1000",
    places=places,
)
