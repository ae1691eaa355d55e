# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees.

Shape suffixes:
    B = samples, S = key positions, Q = selected queries, C = queries of one chunk, W = chosen keys
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Score of a key that a query does not see.
HIDDEN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Visibility:
    """Which keys each selected query sees, without the (S, S) mask.

    Either `rows_BQS` defines it directly (rows of a mask that the model itself built), or a query sees the keys at or
    before its position that are not padding, belong to its segment and, with a window, are at most `window - 1`
    positions before it.
    """

    positions_BQ: torch.Tensor
    key_mask_BS: torch.Tensor | None = None
    segment_ids_BS: torch.Tensor | None = None
    window: int | None = None
    rows_BQS: torch.Tensor | None = None

    @property
    def is_causal_only(self) -> bool:
        return all(x is None for x in (self.key_mask_BS, self.segment_ids_BS, self.window, self.rows_BQS))

    def chunk(self, start: int, stop: int, first_key: int, last_key: int) -> torch.Tensor:
        """(B, C, keys) bool: which of the keys first_key..last_key the queries start..stop see."""
        if self.rows_BQS is not None:
            return self.rows_BQS[:, start:stop, first_key:last_key]
        positions_BC1 = self.positions_BQ[:, start:stop, None]
        keys_S = torch.arange(first_key, last_key, device=positions_BC1.device)
        visible_BCS = keys_S <= positions_BC1
        if self.window is not None:
            visible_BCS = visible_BCS & (keys_S > positions_BC1 - self.window)
        if self.key_mask_BS is not None:
            visible_BCS = visible_BCS & self.key_mask_BS[:, None, first_key:last_key]
        if self.segment_ids_BS is not None:
            segment_BC1 = self.segment_ids_BS.gather(1, self.positions_BQ[:, start:stop])[:, :, None]
            visible_BCS = visible_BCS & (segment_BC1 == self.segment_ids_BS[:, None, first_key:last_key])
        return visible_BCS

    def of_keys(self, start: int, stop: int, keys_BW: torch.Tensor) -> torch.Tensor:
        """(B, C, W) bool: which of the keys at these positions the queries start..stop see."""
        if self.rows_BQS is not None:
            return self.rows_BQS[:, start:stop].gather(2, keys_BW[:, None].expand(-1, stop - start, -1))
        positions_BC1 = self.positions_BQ[:, start:stop, None]
        visible_BCW = keys_BW[:, None] <= positions_BC1
        if self.window is not None:
            visible_BCW = visible_BCW & (keys_BW[:, None] > positions_BC1 - self.window)
        if self.key_mask_BS is not None:
            visible_BCW = visible_BCW & self.key_mask_BS.gather(1, keys_BW)[:, None]
        if self.segment_ids_BS is not None:
            segment_BC1 = self.segment_ids_BS.gather(1, self.positions_BQ[:, start:stop])[:, :, None]
            visible_BCW = visible_BCW & (segment_BC1 == self.segment_ids_BS.gather(1, keys_BW)[:, None])
        return visible_BCW

    def of_samples(self, samples: slice) -> "Visibility":
        """The same for some of the samples."""
        tensors = (self.positions_BQ, self.key_mask_BS, self.segment_ids_BS, self.rows_BQS)
        positions, mask, segments, rows = (None if x is None else x[samples] for x in tensors)
        assert positions is not None
        return Visibility(positions, mask, segments, self.window, rows)

    def chunks(self, size: int, num_keys: int) -> Iterator[tuple[int, int, int, int]]:
        """(start, stop, first, last) of chunks of `size` queries: keys before `first` are visible to all queries of the
        chunk, keys from `last` on to none.

        Only on the CPU: on other devices, reading the positions would synchronise.
        """
        num_queries = self.positions_BQ.shape[1]
        for start in range(0, num_queries, size):
            stop = min(start + size, num_queries)
            first, last = 0, num_keys
            if self.positions_BQ.device.type == "cpu" and self.rows_BQS is None:
                least, greatest = self.positions_BQ[:, start:stop].aminmax()
                last = min(num_keys, int(greatest) + 1)
                first = int(least) + 1 if self.is_causal_only else 0
            yield start, stop, first, last
