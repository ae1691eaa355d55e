# SPDX-License-Identifier: Apache-2.0
"""One reference to the image, and its coordinates in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avar_verl.anchors.formats import FORMATS, SCALES, Format

COORDINATES = ("auto", "absolute", "relative_1000", "normalized", "percent")
"""Values of `coordinates`: `auto` (defined by the format), then pixels, 0-1000, 0-1 and 0-100 of the image."""

TOLERANCE = 1.03
"""Numbers may exceed a scale, or a side of the image, by this factor: models are off by a few pixels at the border."""

KOSMOS_GRID = 32
"""Patches per side of the Kosmos-2 location grid, indices row by row."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """A place in a response that refers to the image.

    Args:
        kind (`str`):
            `bbox`, `point` or `phrase`.
        start, end (`int`):
            `text[start:end]` is the reference: the innermost number group with its own brackets, or the phrase from
            the verb of looking or the preposition to the word for the image (from that word to its verb, if it is the
            subject).
        coords (`tuple[float, ...]` or `None`):
            The numbers as written, so y first for PaliGemma and Gemini, and two patch indices for Kosmos-2. A quad has
            eight numbers; a confidence after the four of a box is left out, and a width and height become the second
            corner. `None` for a phrase. `to_pixels` gives the same meaning for every format.
        label (`str` or `None`):
            Name of the object, if the format has one.
        format (`str`):
            Name of the row in `avar_verl.anchors.formats.FORMATS`; `phrase_en` or `phrase_zh` for a phrase.
        region (`str`):
            Innermost open tag: `think`, `answer`, `rethink`, `tool_call` or `none`.
        scale (`str` or `None`):
            Scale of the coordinates: `absolute`, `patches`, or a key of `avar_verl.anchors.formats.SCALES`. `None` if
            the response does not say, and for a phrase. All numbers of a response decide it together.

    Source: visual anchors of AVAR, arXiv 2603.03825.
    """

    kind: str
    start: int
    end: int
    coords: tuple[float, ...] | None = None
    label: str | None = None
    format: str = ""
    region: str = "none"
    scale: str | None = None


def check_coordinates(coordinates: str) -> None:
    if coordinates not in COORDINATES:
        raise ValueError(
            f"coordinates must be one of {', '.join(COORDINATES)}; got {coordinates!r}. "
            "Pass the system in which the model writes its boxes."
        )


def check_image_size(image_size: tuple[float, float]) -> tuple[float, float]:
    try:
        width, height = image_size
        valid = 0 < width < float("inf") and 0 < height < float("inf")
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            f"image_size must be a positive (width, height); got {image_size!r}. "
            "Pass the size of the image the model saw, after resizing."
        )
    return width, height


def response_scale(
    written: Sequence[tuple[str, tuple[float, ...]]], image_size: tuple[float, float] | None, coordinates: str
) -> str | None:
    """The one scale of all coordinates of a response whose syntax does not define it; `None` if nothing decides.

    `coordinates` unless it is `auto`. Else 0-1000, the scale of Qwen's tags, if a format of the response has it and all
    numbers are within it; 0-1 if all are; pixels if one is beyond 1000; 0-1000 if one is beyond the image.

    Args:
        written: (name of the format, coordinates) of every box and point.
        image_size: (width, height), `None` if unknown.
        coordinates: a value of `COORDINATES`.
    """
    if coordinates != "auto":
        return coordinates
    free = [(FORMATS[name], numbers) for name, numbers in written if not _has_own_scale(FORMATS[name])]
    if not free:
        return None
    greatest = max(max(numbers) for _, numbers in free)
    thousand = greatest <= 1000 * TOLERANCE
    if any(row.scale == "relative_1000" for row, _ in free):
        return "relative_1000" if thousand or image_size and greatest > TOLERANCE * max(image_size) else "absolute"
    if greatest <= 1:
        return "normalized"  # in pixels these would be boxes within one pixel
    if not thousand:
        return "absolute"
    if image_size is None:
        return None
    beyond = any(
        max(numbers[::2]) > TOLERANCE * image_size[0] or max(numbers[1::2]) > TOLERANCE * image_size[1]
        for _, numbers in free
    )
    return "relative_1000" if beyond else None


def _has_own_scale(row: Format) -> bool:
    """Whether the scale does not depend on the other numbers of a response; that of XML points is decided by them."""
    return row.fixed or row.source.startswith("allenai/") or row.name == "qwen_points_xml"


def anchor_scale(format_name: str, coordinates: str, response: str | None) -> str | None:
    """Scale of an anchor: a key of `SCALES`, `absolute` or `patches`; `None` if the text does not say.

    `response` is the scale of `response_scale`.
    """
    row = FORMATS[format_name]
    if row.fixed or coordinates == "auto" and _has_own_scale(row):
        return row.scale
    return response


def to_pixels(anchor: Anchor, image_size: tuple[float, float], coordinates: str = "auto") -> tuple[float, ...]:
    """Coordinates of a box or point in pixels of the image the model saw, origin top left, x right, y down.

    `x * width / scale`, with scale 1000 (`relative_1000`), 1 (`normalized`), 100 (`percent`), 999 (DeepSeek), 1024
    (PaliGemma); y alike, with the height. PaliGemma and Gemini write y first; the result has x first. Kosmos-2 names
    two patches of a 32 x 32 grid: the box runs between the patch centres, between the outer edges if both patches lie
    in one row or column. A quad becomes the box around it. The result is clipped to the image.

    Args:
        anchor (`Anchor`):
            A box or point from `parse_anchors`.
        image_size (`tuple[int, int]`):
            (width, height) of the image the model saw: the *resized* image for Qwen2.5-VL.
        coordinates (`str`, *optional*, defaults to `"auto"`):
            Coordinate system of the numbers. Formats with a fixed scale (`fixed` in `FORMATS`) ignore it; Qwen tags and
            Molmo XML use their own scale only with `auto`, because other models write pixels or 0-1000 in the same
            syntax. JSON boxes have no scale; `auto` then works only if the numbers of the response decide it: all
            are at most 1, or one is beyond 1000 or beyond the image.

    Returns:
        `tuple[float, ...]`: (x1, y1, x2, y2) or (x, y) in pixels, within [0, width] and [0, height].

    Raises:
        ValueError: For a phrase, an unknown `coordinates`, a bad `image_size`, or `auto` if the text does not say.

    Source: one repository file per format, in `FORMATS`; Kosmos-2 as in transformers' `patch_index_to_coordinate`.

    Example:
        >>> box = Anchor("bbox", 0, 20, (100.0, 250.0, 500.0, 750.0), format="bbox_2d_json")
        >>> to_pixels(box, (640, 480), "relative_1000")
        (64.0, 120.0, 320.0, 360.0)
    """
    check_coordinates(coordinates)
    width, height = check_image_size(image_size)
    if anchor.coords is None:
        raise ValueError(f"a phrase has no coordinates; got {anchor}. Pass anchors of kind bbox or point only.")
    if coordinates == "auto" and anchor.scale is not None:
        scale: str | None = anchor.scale
    else:
        alone = response_scale([(anchor.format, anchor.coords)], image_size, coordinates)
        scale = anchor_scale(anchor.format, coordinates, alone)
    if scale is None:
        raise ValueError(
            f"coordinates='auto' needs a format with a scale of its own; got {anchor.format}, which models write in "
            "pixels as well as in 0-1000. Pass coordinates='absolute' (Qwen2.5-VL, DeepEyes) or 'relative_1000' "
            "(Qwen3-VL), or 'normalized' or 'percent'."
        )
    numbers = anchor.coords
    if scale == "patches":
        numbers, scale = _patch_corners(*numbers), "normalized"
    if FORMATS[anchor.format].order == "yx":
        numbers = tuple(number for y, x in zip(numbers[::2], numbers[1::2], strict=True) for number in (x, y))
    x_unit, y_unit = (1, 1) if scale == "absolute" else (width / SCALES[scale], height / SCALES[scale])
    xs = [min(max(x * x_unit, 0.0), float(width)) for x in numbers[::2]]
    ys = [min(max(y * y_unit, 0.0), float(height)) for y in numbers[1::2]]
    return (xs[0], ys[0]) if anchor.kind == "point" else (min(xs), min(ys), max(xs), max(ys))


def _patch_corners(first: float, last: float) -> tuple[float, ...]:
    """Kosmos-2 patch indices -> (x1, y1, x2, y2) in 0-1."""
    y1, x1 = divmod(first, KOSMOS_GRID)
    y2, x2 = divmod(last, KOSMOS_GRID)
    before, after = (0, 1) if x1 == x2 or y1 == y2 else (0.5, 0.5)
    return tuple(
        (index + shift) / KOSMOS_GRID for index, shift in ((x1, before), (y1, before), (x2, after), (y2, after))
    )
