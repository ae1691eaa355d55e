# SPDX-License-Identifier: Apache-2.0
"""verl's SFT data set with reference boxes: guidance towards the image tokens inside them.

    data.custom_cls.path=pkg://avar_verl.data.region_dataset data.custom_cls.name=RegionSFTDataset

Every row of the parquet file has a column `boxes`: for every image a list of (x1, y1, x2, y2), in pixels of the image
as it is stored; an image with an empty list counts whole. `L_enhance` then raises the mass of the image tokens inside
the boxes; the others count as no role. Tokens that a box touches count (`avar_verl.regions`).
"""

import io

import torch
from PIL import Image
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

from avar_verl.regions import REGION_KEY, image_region


def _image_size(image) -> tuple[int, int]:
    """(width, height) of a stored image: PIL, {"bytes": ...} or {"image": path or PIL}, a path."""
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("image", image.get("path"))
    if isinstance(image, Image.Image):
        return image.size
    with Image.open(image) as opened:
        return opened.size


class RegionSFTDataset(MultiTurnSFTDataset):
    """`MultiTurnSFTDataset` whose samples also have `image_region`, (S,) int64: 1 on image tokens inside the boxes.

    Raises:
        ValueError: no column `boxes`, or boxes that do not fit their images; the message names the row.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if "boxes" not in self.dataframe.columns:
            raise ValueError(
                f"RegionSFTDataset needs a column 'boxes'; got {list(self.dataframe.columns)}. Add one list of boxes "
                "for every image, or use verl's data set."
            )

    def __getitem__(self, item: int) -> dict:
        sample = super().__getitem__(item)
        row = self.dataframe.iloc[item]
        images = row.get(self.image_key)
        images = [] if images is None else list(images)
        grids_thw = sample.get("multi_modal_inputs", {}).get("image_grid_thw")
        try:
            region_S = image_region(
                sample["input_ids"],
                self.processor.image_token_id,
                [[list(box) for box in boxes] for boxes in row["boxes"]],
                [_image_size(image) for image in images],
                torch.zeros(0, 3, dtype=torch.long) if grids_thw is None else grids_thw,
                self.processor.image_processor.merge_size,
            )
        except ValueError as error:
            raise ValueError(f"row {item}: {error}") from error
        return {**sample, REGION_KEY: region_S.long()}
