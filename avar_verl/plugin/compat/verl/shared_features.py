# SPDX-License-Identifier: Apache-2.0
"""The rollouts of a prompt store its pixels once, and whoever reads rollouts gets the pixels of every one.

The first rollout of a prompt that is stored holds the pixels, and every row names it under HOLDER (`rollout.worker`).
The rollouts of a prompt are sampled, trained on and cleared together, so the holder is there as long as its readers.

verl's workers read their rows in one place (verl/utils/transferqueue_utils.py:164, `_async_meta_to_realdata`), which
has no plug point. Rows without HOLDER are left as they are.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import NonTensorData

from avar_verl.model.corrupt import PIXELS

Features = dict[str, Any]
FIELD = "multi_modal_inputs"
HOLDER = "avar_holder"
"""In FIELD: [partition, key] of the row whose pixels are those of this row, too."""


def plain_rows(column: Sequence) -> list[Features]:
    """FIELD of a batch as dicts; {} without an image."""
    return [dict(getattr(row, "data", row) or {}) for row in column]


def holds_pixels(row: Features) -> bool:
    return any(name in row for name in PIXELS)


def missing(rows: Sequence[Features]) -> dict[str, list[str]]:
    """Keys by partition of the holders of `rows` that are not among `rows`."""
    held = {tuple(row[HOLDER]) for row in rows if HOLDER in row and holds_pixels(row)}
    named = dict.fromkeys(tuple(row[HOLDER]) for row in rows if HOLDER in row)
    out: dict[str, list[str]] = {}
    for partition, key in named:
        if (partition, key) not in held:
            out.setdefault(partition, []).append(key)
    return out


def complete(rows: Sequence[Features], holders: Sequence[Features]) -> list[Features]:
    """The rows as if each had been stored with its pixels. Tensors are shared, not copied.

    Raises:
        ValueError: a row whose holder is not among `rows` and `holders`.
    """
    pixels = {
        tuple(row[HOLDER]): {name: row[name] for name in PIXELS if name in row}
        for row in (*rows, *holders)
        if HOLDER in row and holds_pixels(row)
    }
    out = []
    for row in rows:
        if HOLDER in row:
            row = dict(row)
            name = tuple(row.pop(HOLDER))
            if name not in pixels:
                raise ValueError(
                    f"the rollout that holds the pixels of a prompt must have them; got none in {name}. Keep and clear "
                    "the rollouts of a prompt together."
                )
            row.update(pixels[name])
        out.append(row)
    return out


def read_features(rows: Sequence[Features]) -> list[Features]:
    """`complete` with the holders' rows from the TransferQueue."""
    holders: list[Features] = []
    for partition, keys in missing(rows).items():
        holders += plain_rows(tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=[FIELD])[FIELD])
    return complete(rows, holders)


async def read_features_async(rows: Sequence[Features]) -> list[Features]:
    """`read_features` in an event loop."""
    holders: list[Features] = []
    for partition, keys in missing(rows).items():
        got = await tq.async_kv_batch_get(keys=keys, partition_id=partition, select_fields=[FIELD])
        holders += plain_rows(got[FIELD])
    return complete(rows, holders)


def apply(transferqueue_utils) -> None:
    """Wrap `_async_meta_to_realdata` of `verl.utils.transferqueue_utils`."""
    original = transferqueue_utils._async_meta_to_realdata

    @functools.wraps(original)
    async def _async_meta_to_realdata(meta):
        data = await original(meta)
        rows = plain_rows(data[FIELD]) if FIELD in data.keys() else []
        if any(HOLDER in row for row in rows):
            rows = await read_features_async(rows)
            data[FIELD] = torch.stack([NonTensorData(row) for row in rows], dim=0)
        return data

    transferqueue_utils._async_meta_to_realdata = _async_meta_to_realdata
