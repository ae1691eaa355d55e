# SPDX-License-Identifier: Apache-2.0
"""Responses and numbers in the terminal."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from avar_verl.anchors import parse_anchors

STYLES = {"bbox": "bold white on blue", "point": "bold white on magenta", "phrase": "black on yellow"}
HISTOGRAM_BINS = 10


def histogram(values: Sequence[float]) -> list[tuple[float, float, int]]:
    """(low, high, count) of HISTOGRAM_BINS equal bins from the smallest to the largest value; one bin if they are
    equal.
    """
    if min(values) == max(values):
        return [(min(values), max(values), len(values))]
    counts, edges = np.histogram(values, HISTOGRAM_BINS)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))


def numbers_table(title: str, columns: Sequence[str], **settings: Any) -> Table:
    """A table whose first column names what the numbers in the others are about. `settings`: of rich's Table."""
    table = Table(title=title, title_justify="left", **settings)
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left", no_wrap=not at)
    return table


def highlighted(text: str, image_size: tuple[int, int] | None = None, coordinates: str = "auto") -> Text:
    """The response with its anchors in the colours of STYLES."""
    out = Text(text)
    for anchor in parse_anchors(text, image_size, coordinates):
        out.stylize(STYLES[anchor.kind], anchor.start, anchor.end)
    return out
