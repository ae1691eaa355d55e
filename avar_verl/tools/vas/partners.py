# SPDX-License-Identifier: Apache-2.0
"""Whose images a row gets for corruption=swap: a matter of the file alone, whatever is measured, in whatever batches.

A row's partner is the next row of the file whose images have the same shapes for the model and other pixels; after the
last row, the first one follows. Rows that share an image, such as several questions about it, are no partners.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from PIL import Image

from avar_verl.data.rows import Row, naming
from avar_verl.model import corrupt
from avar_verl.tools.rows import conversation
from avar_verl.tools.vas.score import image_features


class Looks(NamedTuple):
    """Digests of the images of a row: of the shapes, which a partner's must share, and of the pixels, which not."""

    shape: str
    pixels: str


class Job(NamedTuple):
    """A row to measure, and the row whose images it is given in place of its own, if any."""

    row: Row
    partner: Row | None = None


def looks_of(rows: Iterable[Row], processor: Any, patch_size: int) -> Iterator[Looks | None]:
    """The `Looks` of every row; None for a row without an image.

    Raises:
        ValueError: names a row that has no conversation, or an image that cannot be opened.
    """
    shapes: dict[tuple, str] = {}
    for row in rows:
        with naming(row.where):
            images: list[Image.Image] = conversation(row.values, patch_size).images
        # A processor chooses shapes by the sizes of the images, so one run for each combination of them is enough.
        sizes = tuple(image.size for image in images)
        if images and sizes not in shapes:
            shapes[sizes] = _digest(repr(corrupt.shape_of(image_features(processor, images))).encode())
        yield Looks(shapes[sizes], _digest(*(image.tobytes() for image in images))) if images else None


def _digest(*parts: bytes) -> str:
    """Sixteen hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def partners_of(looks: Iterable[Looks | None], num_rows: int = 0) -> dict[int, int | None]:
    """Row -> its partner, for the first `num_rows` rows (0: all) that have images; None if no row can be the partner.

    Reads no further than it must.

    >>> a, b, c = Looks("square", "a"), Looks("square", "b"), Looks("wide", "c")
    >>> partners_of([a, a, None, b, c])
    {0: 3, 1: 3, 3: 0, 4: None}
    """
    out: dict[int, int | None] = {}
    waiting: dict[str, list[int]] = {}  # Rows of one shape with the same pixels, which wait for other pixels.
    pixels: dict[str, str] = {}  # Theirs, or those of the last row of that shape.
    first: dict[str, dict[str, int]] = {}  # The first row of each of the first two pictures of a shape.
    for index, look in enumerate(looks):
        if num_rows and index >= num_rows and not any(waiting.values()):
            break
        if look is None:
            continue
        if pixels.get(look.shape) != look.pixels:
            out.update(dict.fromkeys(waiting.pop(look.shape, ()), index))
            pixels[look.shape] = look.pixels
        if not num_rows or index < num_rows:
            waiting.setdefault(look.shape, []).append(index)
        known = first.setdefault(look.shape, {})
        if len(known) < 2:
            known.setdefault(look.pixels, index)
    for shape, rows in waiting.items():
        other = next((row for found, row in first[shape].items() if found != pixels[shape]), None)
        out.update(dict.fromkeys(rows, other))
    return dict(sorted(out.items()))


def jobs(rows: Iterable[Row], partners: Mapping[int, int], wanted: Callable[[Row], bool]) -> Iterator[Job]:
    """The `wanted` rows with their `partners`, each as soon as both are read."""
    waiting: dict[int, list[Row]] = {}
    behind = {partner for index, partner in partners.items() if partner < index}
    kept: dict[int, Row] = {}
    for row in rows:
        yield from (Job(one, row) for one in waiting.pop(row.index, ()))
        if row.index in behind:
            kept[row.index] = row
        if not wanted(row):
            continue
        partner = partners.get(row.index)
        if partner is None:
            yield Job(row)
        elif partner < row.index:
            yield Job(row, kept[partner])
        else:
            waiting.setdefault(partner, []).append(row)
