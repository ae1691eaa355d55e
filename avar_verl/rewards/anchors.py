# SPDX-License-Identifier: Apache-2.0
"""Anchor reward: does the reasoning go back to the image, again and again? Pure functions, no verl import.

    anchor = 1/N * sum_{i=1..N} max weight of the distinct anchors that first appear in part i of the reasoning

The reasoning is cut into N equal parts (by characters). An anchor (`avar_verl.anchors`) counts once, where it first
appears; coordinates weigh 1 and phrases `phrase_weight`. So the score is bounded by 1, saturates at one new reference a
part, is spread over the reasoning by construction, and a list of references at one place is worth one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from avar_verl.anchors import Anchor, parse_anchors
from avar_verl.rewards.grounding import box_iou

NUM_PARTS = 4
PHRASE_WEIGHT = 0.5
DUPLICATE_IOU = 0.5
# A box over more than this share of the image points at nothing.
MAX_AREA = 0.9
# Distance under which two points are the same, as a share of the larger coordinate seen.
SAME_POINT = 0.02
# Distinct boxes that a new one is compared with. More than this cannot raise the score: there are fewer parts.
MAX_KEPT = 64

_SENTENCE = re.compile(r"[^.!?。！？\n]+")
_WORD = re.compile(r"\w+")
_FILLERS = frozenset("the a an this that again at to closely carefully more once let me us we i".split())
# Extents of the relative coordinate systems: 0-1, 0-100, 0-1000 and 1024 bins.
_EXTENTS = (1.0, 100.0, 1000.0, 1024.0)


@dataclass(frozen=True)
class AnchorScore:
    """Parts of the anchor score, all unweighted.

    `score` in [0, 1]; `num_anchors` valid references inside the reasoning; `num_distinct` of them that count;
    `num_coordinates` of these that are boxes or points; `parts_covered` of the N parts with a counting reference.
    """

    score: float
    num_anchors: int
    num_distinct: int
    num_coordinates: int
    parts_covered: int


def reasoning_span(text: str, think_in_prompt: bool = False) -> tuple[int, int]:
    """(start, end) of the reasoning: from the first `<think>`, or the beginning, to the first `</think>`, `<answer>` or
    `\\boxed` behind it, or the end.

    What comes later is the answer, whatever tags it opens.
    """
    opened = -1 if think_in_prompt else text.find("<think>")
    start = 0 if opened < 0 else opened + len("<think>")
    ends = [at for at in (text.find(mark, start) for mark in ("</think>", "<answer>", "\\boxed")) if at >= 0]
    return start, min(ends, default=len(text))


def _plain(text: str) -> str:
    """Words alone, without case, width variants and characters that nobody sees."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORD.findall("".join(c for c in folded if unicodedata.category(c) != "Cf")))


def _is_copied(text: str, anchor: Anchor, prompt_words: str) -> bool:
    """Whether the sentence around the anchor stands in the prompt, word for word."""
    start = max((text.rfind(mark, 0, anchor.start) for mark in ".!?。！？\n"), default=-1) + 1
    sentence = _SENTENCE.match(text, start)
    words = _plain(text[start : max(anchor.end, sentence.end() if sentence else anchor.end)])
    return bool(words) and f" {words} " in prompt_words


def _extent(anchors: Sequence[Anchor], image_size: tuple[int, int] | None) -> tuple[float, float] | None:
    """Width and height of the image in the unit of the numbers, as far as that can be told."""
    greatest = max((max(anchor.coords) for anchor in anchors if anchor.coords), default=0.0)
    if image_size is not None and greatest > 1:
        width, height = image_size
        return (float(width), float(height)) if greatest <= 1.05 * max(width, height) else (1000.0, 1000.0)
    for extent in _EXTENTS:
        if greatest <= extent:
            return extent, extent
    return None


def _covers_the_image(box: Sequence[float], extents: Sequence[tuple[float, float]]) -> bool:
    x1, y1, x2, y2 = box
    area = (x2 - x1) * (y2 - y1)
    return any(
        area >= MAX_AREA * width * height and max(x2 / width, y2 / height) <= 1.05 for width, height in extents
    )


class _Distinct:
    """Which anchors are new: boxes by IoU, points by distance, phrases by wording."""

    def __init__(self):
        self.boxes: list[tuple[float, ...]] = []
        self.points: list[tuple[float, ...]] = []
        self.phrases: set[str] = set()

    def add(self, anchor: Anchor, text: str) -> bool:
        if anchor.kind == "phrase":
            words = _plain(text[anchor.start : anchor.end])
            key = " ".join(word for word in words.split() if word not in _FILLERS)
            is_new = key not in self.phrases
            self.phrases.add(key)
            return is_new
        coords = anchor.coords
        if anchor.kind == "bbox" and len(coords) == 4:
            is_new = all(box_iou(coords, kept) < DUPLICATE_IOU for kept in self.boxes)
            if is_new and len(self.boxes) < MAX_KEPT:
                self.boxes.append(coords)
            return is_new
        reach = SAME_POINT * max(1e-9, max(abs(value) for value in coords))
        same = (
            len(kept) == len(coords) and all(abs(a - b) <= reach for a, b in zip(kept, coords, strict=True))
            for kept in self.points
        )
        is_new = not any(same)
        if is_new and len(self.points) < MAX_KEPT:
            self.points.append(coords)
        return is_new


def anchor_score(
    text: str,
    image_size: tuple[int, int] | None = None,
    coordinates: str = "auto",
    prompt: str | None = None,
    think_in_prompt: bool = False,
    num_parts: int = NUM_PARTS,
    phrase_weight: float = PHRASE_WEIGHT,
) -> AnchorScore:
    """Score the references to the image in the reasoning of a response, whether or not its answer is right.

    Args:
        text (`str`):
            Decoded response, without the prompt.
        image_size (`tuple[int, int]`, *optional*):
            (width, height) of the image as the model saw it, for range checks.
        coordinates (`str`, *optional*, defaults to `"auto"`):
            Coordinate system of the boxes, see `parse_anchors`.
        prompt (`str`, *optional*):
            The question. A reference in a sentence that is copied from it does not count.
        think_in_prompt (`bool`, *optional*, defaults to `False`):
            Whether the prompt ends with `<think>`.
        num_parts (`int`, *optional*, defaults to 4):
            N, >= 1.
        phrase_weight (`float`, *optional*, defaults to 0.5):
            Weight of a reference in words beside one by coordinates, in [0, 1]; 0 pays coordinates alone.

    Returns:
        `AnchorScore`.

    Raises:
        ValueError: `num_parts` or `phrase_weight` out of range, or what `parse_anchors` refuses.

    Source: the visual anchors of AVAR, arXiv 2603.03825; the score is this project's.

    Example:
        >>> text = "<think>Look at the image: a cup at [40, 60, 90, 120]. " + "So on and so forth. " * 9 + "</think>"
        >>> anchor_score(text)
        AnchorScore(score=0.25, num_anchors=2, num_distinct=2, num_coordinates=1, parts_covered=1)
    """
    if num_parts < 1 or not 0 <= phrase_weight <= 1:
        raise ValueError(
            f"num_parts must be >= 1 and phrase_weight in [0, 1]; got {num_parts!r} and {phrase_weight!r}. "
            "Set them in reward_kwargs."
        )
    start, end = reasoning_span(text, think_in_prompt)
    found = [a for a in parse_anchors(text, image_size, coordinates) if start <= a.start and a.end <= end]
    if prompt is not None and found:
        prompt_words = f" {_plain(prompt)} "
        found = [anchor for anchor in found if not _is_copied(text, anchor, prompt_words)]
    extent = _extent(found, image_size)
    extents = [] if extent is None else [extent]
    distinct, best = _Distinct(), [0.0] * num_parts
    num_distinct = num_coordinates = 0
    for anchor in found:
        if anchor.kind == "bbox" and len(anchor.coords) == 4 and _covers_the_image(anchor.coords, extents):
            continue
        if not distinct.add(anchor, text):
            continue
        num_distinct += 1
        num_coordinates += anchor.kind != "phrase"
        part = min(num_parts - 1, (anchor.start - start) * num_parts // (end - start))
        best[part] = max(best[part], phrase_weight if anchor.kind == "phrase" else 1.0)
    return AnchorScore(
        score=sum(best) / num_parts,
        num_anchors=len(found),
        num_distinct=num_distinct,
        num_coordinates=num_coordinates,
        parts_covered=sum(value > 0 for value in best),
    )
