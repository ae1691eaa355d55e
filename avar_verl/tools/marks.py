# SPDX-License-Identifier: Apache-2.0
"""Anchors of a response, for pages that mark them in its text and draw them on its image."""

from collections.abc import Sequence

from avar_verl.anchors import parse_anchors, to_pixels

Span = tuple[int, int, str, int | None]
"""(start, end, class, number of the place that is drawn or None) of a stretch of text."""


def anchor_spans(
    text: str, size: tuple[int, int] | None, coordinates: str
) -> tuple[list[Span], list[tuple[float, ...]]]:
    """Spans of the anchors, of the classes bbox, point and phrase, and the places: boxes and points in pixels.

    Args:
        size: (width, height) of the image that coordinates are of; None: nothing is drawn.
        coordinates: as in `to_pixels`. With `auto`, an anchor of unknown scale is marked and not drawn.
    """
    spans: list[Span] = []
    places: list[tuple[float, ...]] = []
    for anchor in parse_anchors(text, size, coordinates):
        number = None
        if anchor.coords is not None and size is not None and (anchor.scale is not None or coordinates != "auto"):
            number = len(places)
            places.append(to_pixels(anchor, size, coordinates))
        spans.append((anchor.start, anchor.end, anchor.kind, number))
    return spans, places


def pieces(text: str, spans: Sequence[Span]) -> list[tuple[str, str, int | None]]:
    """(text, classes separated by spaces, number of a place or None) of the whole text, in order.

    Spans may nest or overlap: the text is cut at every boundary; each piece gets the classes of all its spans.

    >>> pieces("a cup", [(2, 5, "phrase", None)])
    [('a ', '', None), ('cup', 'phrase', None)]
    """
    cuts = sorted({0, len(text), *(cut for start, end, *_ in spans for cut in (start, end))})
    out = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        over = [span for span in spans if span[0] <= start and end <= span[1]]
        numbers = [span[3] for span in over if span[3] is not None]
        out.append((text[start:end], " ".join(sorted({span[2] for span in over})), numbers[0] if numbers else None))
    return out
