# SPDX-License-Identifier: Apache-2.0
"""An SFT data set that prepares each sample once: `data.custom_cls` of the demo's cold start.

The demo makes several passes over a few hundred small images, and on a CPU the image processor costs more than the
training step. Not suitable for data sets that do not fit into memory.
"""

from avar_verl.plugin.datasets.sft import AvarSFTDataset


class CachedSFTDataset(AvarSFTDataset):
    """`AvarSFTDataset` that caches its samples, which must not be modified."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._cache: dict[int, dict] = {}

    def __getitem__(self, item: int) -> dict:
        if item not in self._cache:
            self._cache[item] = super().__getitem__(item)
        return self._cache[item]
