# SPDX-License-Identifier: Apache-2.0
"""The SFT data set, each sample prepared once: `data.custom_cls` of the demo's cold start.

The demo passes several times over a few hundred small images, and on a CPU the image processor costs more than the
training step. A data set that does not fit into memory is no place for this.
"""

from avar_verl.plugin.datasets.sft import AvarSFTDataset


class CachedSFTDataset(AvarSFTDataset):
    """`AvarSFTDataset` that remembers its samples. Samples are not changed after they are made."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._cache: dict[int, dict] = {}

    def __getitem__(self, item: int) -> dict:
        if item not in self._cache:
            self._cache[item] = super().__getitem__(item)
        return self._cache[item]
