# SPDX-License-Identifier: Apache-2.0
"""The SFT data set with reference boxes: guidance towards the image tokens inside them.

    data.custom_cls.path=pkg://avar_verl.plugin.datasets.region data.custom_cls.name=RegionSFTDataset

Every row has a column `boxes`: for every image a list of (x1, y1, x2, y2), in pixels of the stored image; an empty list
means the whole image. `L_enhance` then raises the mass of image tokens inside the boxes; other image tokens have no
role. A token counts as inside if a box overlaps it (`avar_verl.model.regions`).
"""

from avar_verl.data.images import open_image
from avar_verl.model.families import get_family
from avar_verl.model.regions import REGION_KEY, image_region
from avar_verl.plugin.datasets.sft import AvarSFTDataset


class RegionSFTDataset(AvarSFTDataset):
    """`AvarSFTDataset` whose samples also have `image_region`, (S,) int64: 1 on image tokens inside the boxes.

    Raises:
        ValueError: no column `boxes`, boxes that do not match their images, or a family without known places of image
            tokens; the message names the row.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if "boxes" not in self.dataframe.columns:
            raise ValueError(
                f"RegionSFTDataset needs a column 'boxes'; got {list(self.dataframe.columns)}. Add one list of boxes "
                "for every image, or use AvarSFTDataset."
            )

    def _sample(self, row: dict) -> dict:
        sample = super()._sample(row)
        images = self.images(row)
        places = get_family(self.processor.config.model_type).image_places(
            self.processor, sample["multi_modal_inputs"], [self._open(image).size for image in images]
        )
        region_S = image_region(
            sample["input_ids"],
            self.role_map.image_token_ids,
            [list(boxes) for boxes in row["boxes"] or []],
            [open_image(image, allow_urls=self.allow_urls).size for image in images],
            places,
        )
        return {**sample, REGION_KEY: region_S.long()}
