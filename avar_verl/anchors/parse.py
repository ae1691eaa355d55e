# SPDX-License-Identifier: Apache-2.0
"""References to the image in a response: coordinates and phrases, without text of the environment and invalid
references.

This module handles regions, cuts, geometry and repeats; `formats` finds coordinates and `phrases` finds phrases.
"""

from __future__ import annotations

import re
from collections import Counter
from operator import itemgetter

from avar_verl.anchors.anchor import (
    TOLERANCE,
    Anchor,
    anchor_scale,
    check_coordinates,
    check_image_size,
    response_scale,
)
from avar_verl.anchors.formats import FORMATS, SCALES, Reference, scan_coordinates
from avar_verl.anchors.phrases import Sentences, scan_chinese, scan_english

CLIP_TOLERANCE = TOLERANCE - 1
"""Fraction of a side by which coordinates may be outside the image."""

MAX_PIXELS = 100_000
"""Largest coordinate if neither the image size nor the scale is known."""

SPAM_REPEATS = 3
"""From this many verbatim copies, only the first one counts."""

COPY_REACH = 40
"""Characters on each side of a phrase, within its sentence, that make it a copy of another one."""

MAX_CHAIN_GAP = 40
"""Most characters between two links of a chain of copies."""

# Full-width forms of the characters that formats are made of. One for one, so that positions stay.
_FULL_WIDTH = {chr(code + 0xFEE0): chr(code) for code in map(ord, "0123456789()[]<>|,.:;=\"'-/{}?!")} | {"\u3000": " "}


def _to_ascii(text: str) -> str:
    if text.isascii():
        return text
    for wide, narrow in _FULL_WIDTH.items():
        text = text.replace(wide, narrow)
    return text


_ESCAPED_KEY = re.compile(r"""\\+["'][A-Za-z0-9_ -]{1,24}\\+["']\s*:""")
_ESCAPED_QUOTE = re.compile(r"""(\w?)\\+(["'])""")
_ESCAPED_SPACE = re.compile(r"""\\+[nrt](?=[\s\[\]{}()"'0-9\\-])""")


def _unescape(text: str) -> str:
    """JSON inside a JSON string: `\\"` if a key is written so, `\\n` between brackets, numbers and quotes.

    One for one, as above; the quote stays next to the word it closes or opens.
    """
    if "\\" not in text:
        return text
    if _ESCAPED_KEY.search(text):
        text = _ESCAPED_QUOTE.sub(
            lambda match: (match[1] + match[2]).ljust(len(match[0])) if match[1] else match[2].rjust(len(match[0])),
            text,
        )
    return _ESCAPED_SPACE.sub(lambda match: " " * len(match[0]), text)


def _lower(text: str) -> str:
    low = text.lower()
    if len(low) == len(text):
        return low
    return "".join(c.lower() if c.isascii() else c for c in text)  # some letters grow, as I with a dot above


# --- Regions, and text that is not the model's ---

_REGION_TAG = re.compile(r"<(/?)(think|answer|rethink|tool_call)>")


def _regions(text: str) -> list[tuple[int, str]]:
    """(start, innermost open tag) of each stretch of text, in order."""
    stretches = [(0, "none")]
    stack: list[str] = []
    opened = Counter()  # looking into a deep stack at every closing tag would take quadratic time
    for match in _REGION_TAG.finditer(text):
        name = match[2]
        if not match[1]:
            # A tool call holds no other tag: one that is still open lost its closing tag to the stop string.
            while stack and stack[-1] == "tool_call":
                opened[stack.pop()] -= 1
            stack.append(name)
            opened[name] += 1
        elif opened[name]:
            last = None
            while last != name:
                last = stack.pop()
                opened[last] -= 1
        elif name == "think" and not stack and stretches == [(0, "none")]:
            stretches = [(0, "think")]  # the chat template wrote the opening tag
        stretches.append((match.end(), stack[-1] if stack else "none"))
    return stretches


_FOREIGN_MARKS = (
    "tool_response>",
    "<observation>",
    "<|observation|>",
    "<|im_start|>",
    "[TOOL_RESPONSE]",
    "oomed in on",
    "ere is the ",
)
_FOREIGN = re.compile(
    r"<tool_response>|\[TOOL_RESPONSE\]|<observation>|<\|observation\|>|<\|im_start\|>(?!assistant)"
    r"|[Zz]oomed in on the image to the region|[Hh]ere is the (?:cropped|zoomed|zoom-in|enlarged)[a-z -]{0,16}image"
)
_FOREIGN_END = {
    "<tool_response>": ("</tool_response>", "<|im_start|>assistant"),
    "[TOOL_RESPONSE]": ("\n[", "<think>"),
    "<observation>": ("</observation>", "<|im_start|>assistant"),
    "<|observation|>": ("<|assistant|>",),
    "<|im_start|>": ("<|im_start|>assistant",),
}


def _foreign_spans(text: str) -> list[tuple[int, int]]:
    """Spans that the environment wrote: tool responses, also unclosed ones, other roles' turns, zoom messages."""
    if not any(mark in text for mark in _FOREIGN_MARKS):
        return []
    spans = []
    end = 0
    ahead: dict[str, int] = {}  # next place of each closer; searched again only once passed, so time stays linear
    for match in _FOREIGN.finditer(text):
        if match.start() < end:
            continue
        end = len(text)
        for closer in _FOREIGN_END.get(match[0], ("\n",)):
            if 0 <= ahead.get(closer, 0) < match.end():
                ahead[closer] = text.find(closer, match.end())
            if ahead[closer] >= 0:
                end = min(end, ahead[closer])
        spans.append((match.start(), end))
    return spans


# --- Geometry ---


def _fits(numbers: tuple[float, ...], width: float, height: float) -> bool:
    xs, ys = numbers[::2], numbers[1::2]
    return (
        min(xs) >= -CLIP_TOLERANCE * width
        and max(xs) <= (1 + CLIP_TOLERANCE) * width
        and min(ys) >= -CLIP_TOLERANCE * height
        and max(ys) <= (1 + CLIP_TOLERANCE) * height
    )


def _has_area(reference: Reference) -> bool:
    """Whether the numbers are a box with an area, or a point."""
    row = FORMATS[reference.format]
    numbers = reference.coords
    if row.scale == "patches":
        (y1, x1), (y2, x2) = divmod(numbers[0], 32), divmod(numbers[1], 32)
        return x1 <= x2 and y1 <= y2 and max(numbers) < 32 * 32
    if len(numbers) == 4:
        return numbers[0] < numbers[2] and numbers[1] < numbers[3]
    return len(numbers) == 2 or len(set(numbers[::2])) > 1 and len(set(numbers[1::2])) > 1


def _inside(reference: Reference, scale: str | None, image_size: tuple[float, float] | None) -> bool:
    """Whether the numbers are inside the image, and a box is at least a pixel wide and high."""
    row = FORMATS[reference.format]
    numbers = reference.coords
    if scale == "patches":
        return True
    if row.order == "yx":
        numbers = tuple(number for y, x in zip(numbers[::2], numbers[1::2], strict=True) for number in (x, y))
    if len(numbers) > 2:
        width, height = max(numbers[::2]) - min(numbers[::2]), max(numbers[1::2]) - min(numbers[1::2])
        if scale in SCALES and image_size is not None:
            width, height = width * image_size[0] / SCALES[scale], height * image_size[1] / SCALES[scale]
        if min(width, height) < 1 and (image_size is not None or scale not in SCALES):
            return False
    systems = []
    if scale == "absolute" or scale is None:
        systems.append(image_size or (MAX_PIXELS, MAX_PIXELS))
    if scale is None:
        systems.append((1000.0, 1000.0))
    elif scale != "absolute":
        systems.append((SCALES[scale], SCALES[scale]))
    return any(_fits(numbers, *system) for system in systems)


# --- Everything together ---


def parse_anchors(text: str, image_size: tuple[int, int] | None = None, coordinates: str = "auto") -> list[Anchor]:
    """Find every reference to the image in a response.

    Left out: text of the environment (`<tool_response>`, closed or not, other roles' turns, zoom messages), restated
    questions, placeholders, malformed, truncated and degenerate boxes, boxes outside the image (beyond
    `CLIP_TOLERANCE`), three-dimensional boxes, intervals, points and matrices of mathematics, lists of data, other
    senses of the words, and copies: of a reference or a sentence that occurs `SPAM_REPEATS` times or more, only the
    first counts.

    Linear in the length of the text, for any text.

    Args:
        text (`str`):
            Decoded response, without the prompt.
        image_size (`tuple[int, int]`, *optional*):
            (width, height) in pixels of the image the model saw. Without it pixel boxes have no upper bound.
        coordinates (`str`, *optional*, defaults to `"auto"`):
            Coordinate system of the numbers: `absolute` (pixels), `relative_1000`, `normalized` (0-1), `percent`, or
            `auto`: that of the format, else the one that all numbers of the response fit. Decides what is inside the
            image, and is the `scale` of the anchors.

    Returns:
        `list[Anchor]`: In text order.

    Raises:
        ValueError: For an unknown `coordinates` or a bad `image_size`.
        TypeError: If `text` is not a string.

    Source: visual anchors of AVAR, arXiv 2603.03825; formats as in `avar_verl.anchors.formats.FORMATS`.

    Example:
        >>> text = '<think>The image shows a cat. {"bbox_2d": [10, 20, 110, 220], "label": "cat"}</think>'
        >>> [(a.kind, text[a.start : a.end], a.label, a.region) for a in parse_anchors(text)]
        [('phrase', 'The image shows', None, 'think'), ('bbox', '[10, 20, 110, 220]', 'cat', 'think')]
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str; got {type(text).__name__}. Pass the decoded response.")
    check_coordinates(coordinates)
    size = None if image_size is None else check_image_size(image_size)

    plain = _to_ascii(text)
    low = _lower(plain)
    sentences = Sentences(low)
    foreign = _foreign_spans(plain)
    written = [
        (ref.start, ref.end, FORMATS[ref.format].kind, ref.coords, ref.label, ref.format)
        for ref in scan_coordinates(_unescape(plain))
        if _has_area(ref)
    ]
    own = _outside(written, foreign)
    scale = response_scale([(name, numbers) for *_, numbers, _, name in own], size, coordinates)
    found: list[_Found] = []
    for start, end, kind, numbers, label, name in own:
        its_scale = anchor_scale(name, coordinates, scale)
        if _inside(Reference(name, start, end, numbers), its_scale, size):
            found.append((start, end, kind, numbers, label, name, its_scale))
    phrases = [(*span, "phrase", None, None, "phrase_en", None) for span in scan_english(low, sentences)]
    if not text.isascii():
        phrases += [(*span, "phrase", None, None, "phrase_zh", None) for span in scan_chinese(plain)]
    found += _outside(phrases, foreign)
    if not found:
        return []
    found.sort(key=itemgetter(0, 1))
    return _with_regions(_without_copies(_without_chains(found, low), low, sentences), _regions(plain))


_Found = tuple[int, int, str, tuple[float, ...] | None, str | None, str, str | None]
"""(start, end, kind, coords, label, format, scale): an anchor before its region is known."""


def _outside(found: list[tuple], spans: list[tuple[int, int]]) -> list[tuple]:
    """The text outside all of the spans."""
    if not spans:
        return found
    kept = []
    i = 0
    for item in found:
        while i < len(spans) and spans[i][1] <= item[0]:
            i += 1
        if i == len(spans) or item[1] <= spans[i][0]:
            kept.append(item)
    return kept


def _without_copies(found: list[_Found], low: str, sentences: Sentences) -> list[_Found]:
    """Drop the second and later copies of what occurs `SPAM_REPEATS` times: a box by its numbers, a phrase by its
    surroundings."""
    keys = []
    for start, end, kind, coords, *_ in found:
        if coords is not None:
            keys.append((kind, coords))
            continue
        # The sentence near the phrase, without tags: copies that drift apart at their end are still copies.
        left, right = sentences.at(start)
        left = max(left, start - COPY_REACH, low.rfind(">", max(left, start - COPY_REACH), start) + 1)
        right = min(right, end + COPY_REACH)
        keys.append((low[left:start].lstrip(), low[start:right].partition("<")[0].rstrip()))
    counts = Counter(keys)
    seen = set()
    kept = []
    for item, key in zip(found, keys, strict=True):
        if counts[key] < SPAM_REPEATS or key not in seen:
            kept.append(item)
        seen.add(key)
    return kept


def _without_chains(found: list[_Found], low: str) -> list[_Found]:
    """Drop the second and later links of one phrase repeated without an end of sentence: "look at the image, look at
    the image, look at the image"."""
    links: list[str | None] = [None]
    for previous, item in zip(found, found[1:], strict=False):
        near = item[2] == previous[2] == "phrase" and item[0] - previous[1] <= MAX_CHAIN_GAP
        same = near and low[item[0] : item[1]] == low[previous[0] : previous[1]]
        links.append(low[previous[1] : item[1]] if same else None)
    counts = Counter(links)
    return [item for item, link in zip(found, links, strict=False) if link is None or counts[link] < SPAM_REPEATS - 1]


def _with_regions(found: list[_Found], stretches: list[tuple[int, str]]) -> list[Anchor]:
    i = 0
    anchors = []
    for start, end, kind, coords, label, name, scale in found:
        while i + 1 < len(stretches) and stretches[i + 1][0] <= start:
            i += 1
        anchors.append(Anchor(kind, start, end, coords, label, name, stretches[i][1], scale))
    return anchors
