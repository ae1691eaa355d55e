# SPDX-License-Identifier: Apache-2.0
"""Responses and numbers as the terminal shows them."""

from rich.text import Text

from avar_verl.anchors import parse_anchors

STYLES = {"bbox": "bold white on blue", "point": "bold white on magenta", "phrase": "black on yellow"}
HISTOGRAM_BINS = 10


def histogram(values: list[float]) -> list[tuple[float, float, int]]:
    """(low, high, count) of HISTOGRAM_BINS equal bins from the least to the greatest value; one if they are equal."""
    low, high = min(values), max(values)
    if low == high:
        return [(low, high, len(values))]
    width = (high - low) / HISTOGRAM_BINS
    counts = [0] * HISTOGRAM_BINS
    for value in values:
        counts[min(HISTOGRAM_BINS - 1, int((value - low) / width))] += 1
    return [(low + i * width, low + (i + 1) * width, count) for i, count in enumerate(counts)]


def highlighted(text: str, image_size: tuple[int, int] | None = None, coordinates: str = "auto") -> Text:
    """The response with its anchors in the colours of STYLES."""
    out = Text(text)
    for anchor in parse_anchors(text, image_size, coordinates):
        out.stylize(STYLES[anchor.kind], anchor.start, anchor.end)
    return out
