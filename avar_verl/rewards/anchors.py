# SPDX-License-Identifier: Apache-2.0
"""Anchor reward: does the reasoning keep referring to the image? Pure functions, no verl import.

    anchor = min(1, 32 / places) min(1, sum_{i=1..N} max weight of the anchors that are read in part i / 1.5)

The reasoning is divided into N parts with equal amounts of prose: characters of words outside coordinates, quotes and
tags, so a list of references takes up almost nothing, however long it is, and separators are nothing. Coordinates have
weight 1 and phrases `phrase_weight`; `places` is the number of different boxes and points. An anchor
(`avar_verl.anchors`) is read if

- it is new: it counts once, where it first appears;
- it has three words of its own: words around it that describe something (`avar_verl.rewards.prose`), among other words,
  and that no other anchor has taken. As much as one box and one phrase is paid without them, in parts where nothing
  else is.

So a box and a phrase in different parts earn the whole score, and so do two boxes that say what is there. Nothing earns
more, since a text alone does not show whether what it says is true: words that are cut off or made up win nothing over
two honest references. A list in one place is paid at most once, and one of more than 32 places is paid less.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from avar_verl.anchors import Anchor, parse_anchors, to_pixels
from avar_verl.anchors.anchor import TOLERANCE
from avar_verl.anchors.phrases import Sentences
from avar_verl.rewards import prose
from avar_verl.rewards.grounding import box_iou

NUM_PARTS = 4
PHRASE_WEIGHT = 0.5
# Words of its own that a reference needs, other words around it, and how far from it they are, in characters.
OWN_WORDS = 3
OTHER_WORDS = 2
REACH = 160
# Other words for each one that describes, in sentences that describe something: stock sentences have more.
MOST_OTHERS = 3
# What earns the whole score: a box and a phrase.
ENOUGH = 1.5
# Different boxes and points in a response; more of them are a list and reduce the score.
MOST_PLACES = 32
DUPLICATE_IOU = 0.5
# A box over more than this fraction of the image does not point at anything.
MAX_AREA = 0.9
# Distance up to which two points are the same, as a fraction of the image's width and height.
SAME_POINT = 0.02
# Number of places that a new one is compared with, so that a list of thousands takes linear time.
MAX_KEPT = 64
# Usual scales of relative coordinates, and a large image.
SCALES = (1.0, 100.0, 1000.0, 1024.0, 4096.0)

_WORD = re.compile(r"\w+")
# Labels in tags, tags, and strings.
_WRAPPING = re.compile(
    r"<(?:(?:ref|p|phrase|pred|points?)\b[^<>\n]{0,400}|\|object_ref_start\||\|ref\|)>[^<>\n]{0,100}(?=<)|<[^<>\n]{0,400}>"
    r"|\"[^\"\n]{0,100}\"|(?<=[\s{\[:,(])'[^'\n]{1,100}'(?=\s{0,9}[}\],:)])"
)
# Numbers in brackets, attributes or fields, whether or not they are a valid place.
_NUMBER_GROUP = re.compile(
    r"""[\[(<][^\[\]()<>]{0,8}[0-9][0-9\s.,;]{0,60}[\])>]|[0-9]\s?[,;:"'>]{1,3}\s?["'a-z_<]{0,8}\s?[=:"'\s]{0,4}[0-9.]{1,12}"""
)
_FILLERS = frozenset("the a an this that again at to closely carefully more once let me us we i".split())


@dataclass(frozen=True)
class AnchorScore:
    """Parts of the anchor score, all unweighted.

    `score` in [0, 1]; `num_anchors` valid references inside the reasoning; `num_distinct`, how many of them are new;
    `num_coordinates`, how many of those are boxes or points; `parts_covered` of the N parts with a new reference;
    `num_read`, how many of the new ones are read.
    """

    score: float
    num_anchors: int
    num_distinct: int
    num_coordinates: int
    parts_covered: int
    num_read: int


def reasoning_span(text: str, think_in_prompt: bool = False) -> tuple[int, int]:
    """(start, end) of the reasoning: from the first `<think>`, or the beginning, to the first `</think>`, `<answer>` or
    `\\boxed` after it, or the end.

    Later text is the answer, whatever tags it opens.
    """
    opened = -1 if think_in_prompt else text.find("<think>")
    start = 0 if opened < 0 else opened + len("<think>")
    ends = [at for at in (text.find(mark, start) for mark in ("</think>", "<answer>", "\\boxed")) if at >= 0]
    return start, min(ends, default=len(text))


def _plain(text: str) -> str:
    """Only the words, without case, width variants and invisible characters."""
    return " ".join(_WORD.findall(prose.visible(text).casefold()))


def _without_copies(text: str, found: list[Anchor], prompt: str, start: int) -> list[Anchor]:
    """Drop the anchors whose sentence, from the `start` of the reasoning on, is in the prompt word for word."""
    prompt_words = f" {_plain(prompt)} "
    sentences = Sentences(text)
    is_copied: dict[int, bool] = {}  # by the end of the sentence, so that one with many anchors is read once
    kept = []
    for anchor in found:
        left, right = sentences.at(anchor.start)
        if right not in is_copied:
            words = _plain(text[max(left, start) : right])
            is_copied[right] = bool(words) and f" {words} " in prompt_words
        if not is_copied[right]:
            kept.append(anchor)
    return kept


def _unit_coordinates(
    found: Sequence[Anchor], image_size: tuple[int, int] | None, coordinates: str
) -> list[tuple[float, ...] | None]:
    """(x1, y1, x2, y2) or (x, y) of every anchor as fractions of the image's width and height, None for a phrase.

    Numbers of unknown scale are read as pixels if the image is known and contains them all, else in the smallest common
    scale that contains them. This is enough to compare them with one another.
    """
    scales = [a.scale for a in found]
    unknown = [a.coords for a, scale in zip(found, scales, strict=True) if a.coords and scale in (None, "absolute")]
    greatest = max((max(coords) for coords in unknown), default=0.0)
    if image_size is not None and (coordinates == "absolute" or greatest <= TOLERANCE * max(image_size)):
        extent = image_size
    else:
        extent = next(((scale, scale) for scale in SCALES if greatest <= scale), (greatest, greatest))
    out = []
    for anchor, scale in zip(found, scales, strict=True):
        if anchor.coords is None:
            out.append(None)
        elif scale in (None, "absolute"):
            width, height = extent
            x1, y1, *rest = to_pixels(anchor, extent, "absolute")
            out.append((x1 / width, y1 / height, *(n / side for n, side in zip(rest, extent, strict=False))))
        else:
            out.append(to_pixels(anchor, (1, 1), coordinates))
    return out


def _prose(text: str) -> str:
    """The text with spaces for quotes and tags."""
    return _WRAPPING.sub(lambda match: " " * len(match[0]), text) if re.search("[\"'<]", text) else text


_ENDS = re.compile(r"[.!?\n\u3002\uff01\uff1f]")
_SENTENCE = re.compile(r"[^\w]*\w[^.!?\n\u3002\uff01\uff1f]*[.!?\n\u3002\uff01\uff1f]")


class _OwnWords:
    """Whether references have words of their own, which each word is only once, for the first reference that takes it.

    The words of a reference are those before it, and after it to the end of the sentence, no further than `REACH`
    characters and the next number group (for a phrase also the next phrase). Words in quotes and tags, and those of the
    phrase itself, are not among them.
    """

    def __init__(self, text: str, span: tuple[int, int], found: list[Anchor], prompt: str | None):
        self.text, self.span = _prose(text), span
        self.question = {prose.word_key(word) for word in prose.words(prompt or "")}
        groups = [match.span() for match in _NUMBER_GROUP.finditer(text, *span)]
        coordinates = sorted({*groups, *((a.start, a.end) for a in found if a.coords is not None)})
        self.barriers = {
            True: coordinates,
            False: sorted({*coordinates, *((a.start, a.end) for a in found if a.coords is None)}),
        }
        self.starts = {kind: [start for start, _ in spans] for kind, spans in self.barriers.items()}
        self.furthest = {
            kind: list(accumulate((end for _, end in spans), max)) for kind, spans in self.barriers.items()
        }
        self.taken: set[str] = set()

    def _around(self, anchor: Anchor) -> list[list[str]]:
        """Words of each sentence around `anchor`."""
        kind = anchor.coords is not None
        starts, furthest = self.starts[kind], self.furthest[kind]
        before = bisect.bisect_left(starts, anchor.start) - 1
        left = max(self.span[0], anchor.start - REACH, furthest[before] if before >= 0 else 0)
        while 0 < left < anchor.start and self.text[left - 1 : left + 1].isalnum():
            left += 1  # no part of a word is a word
        after = bisect.bisect_left(starts, anchor.end)
        barrier = starts[after] if after < len(starts) else self.span[1]
        right = min(anchor.end + REACH, barrier)
        while anchor.end < right < barrier and self.text[right - 1 : right + 1].isalnum():
            right -= 1
        following = self.text[anchor.end : right]
        sentence = _SENTENCE.match(following)
        if sentence:
            following = sentence[0]
        elif right == barrier < self.span[1]:
            following = ""  # "a cup at [..], a plate at [..]": what is between two places names the second
        parts = (*_ENDS.split(self.text[left : anchor.start]), following)
        return [list(prose.words(part)) for part in parts]

    def take(self, anchor: Anchor) -> bool:
        """Whether words around `anchor` describe something that no other reference has taken; if so, take them."""
        needed = OWN_WORDS * prose.WORD_WEIGHT
        weight = others = described = 0
        own: list[str] = []
        for sentence in self._around(anchor):
            descriptive = [word for word in sentence if prose.describes(word)]
            if descriptive:
                others += len(sentence) - len(descriptive)
            for word in descriptive:
                key = prose.word_key(word)
                if key in self.question:
                    continue
                described += 1
                if weight < needed and key not in self.taken and key not in own:
                    own.append(key)
                    weight += prose.CHARACTER_WEIGHT if prose.is_character(word) else prose.WORD_WEIGHT
        if weight < needed or not OTHER_WORDS <= others <= MOST_OTHERS * described:
            return False
        self.taken.update(own)
        return True


class _Distinct:
    """Which anchors are new: boxes by IoU, points by distance, phrases by wording."""

    def __init__(self):
        self.boxes: list[tuple[float, ...]] = []
        self.points: list[tuple[float, ...]] = []
        self.phrases: set[str] = set()

    def is_new_phrase(self, words: str) -> bool:
        key = " ".join(word for word in words.split() if word not in _FILLERS)
        is_new = key not in self.phrases
        self.phrases.add(key)
        return is_new

    def is_new_place(self, place: tuple[float, ...]) -> bool:
        if len(place) == 2:
            kept = self.points
            is_new = not any(max(abs(place[0] - x), abs(place[1] - y)) <= SAME_POINT for x, y in kept)
        else:
            kept = self.boxes
            is_new = not any(box_iou(place, box) >= DUPLICATE_IOU for box in kept)
        if is_new and len(kept) < MAX_KEPT:
            kept.append(place)
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
            N, >= 1. With one part, one box or point earns the whole score.
        phrase_weight (`float`, *optional*, defaults to 0.5):
            Weight of a phrase, relative to coordinates, in [0, 1]; 0 pays only for coordinates.

    Returns:
        `AnchorScore`.

    Raises:
        ValueError: `num_parts` or `phrase_weight` out of range, or what `parse_anchors` refuses.

    Source: the visual anchors of AVAR, arXiv 2603.03825; the score is this project's.

    Example:
        >>> text = "<think>Look at the image: a cup at [40, 60, 90, 120]. " + "So on and so forth. " * 9 + "</think>"
        >>> result = anchor_score(text)  # a phrase and a box, both in the first part
        >>> round(result.score, 4), result.num_distinct, result.parts_covered
        (0.6667, 2, 1)
    """
    if num_parts < 1 or not 0 <= phrase_weight <= 1:
        raise ValueError(
            f"num_parts must be >= 1 and phrase_weight in [0, 1]; got {num_parts!r} and {phrase_weight!r}. "
            "Set them in reward_kwargs."
        )
    start, end = reasoning_span(text, think_in_prompt)
    found = [a for a in parse_anchors(text, image_size, coordinates) if start <= a.start and a.end <= end]
    if not found:
        return AnchorScore(0.0, 0, 0, 0, 0, 0)
    if prompt is not None:
        found = _without_copies(text, found, prompt, start)
    # Amount of prose before every anchor, and in total. The words of a phrase are prose, numbers are not.
    starts = [*(anchor.start for anchor in found), end]
    ends = [start, *(anchor.start if anchor.coords is None else anchor.end for anchor in found)]
    amounts = list(accumulate(prose.amount(_prose(text[a:b])) for a, b in zip(ends, starts, strict=True)))
    if not amounts[-1]:
        return AnchorScore(0.0, len(found), 0, 0, 0, 0)

    def weight(anchor: Anchor) -> float:
        return phrase_weight if anchor.coords is None else 1.0

    distinct = _Distinct()
    new = []
    places = _unit_coordinates(found, image_size, coordinates)
    for anchor, place, before in zip(found, places, amounts[:-1], strict=True):
        part = min(num_parts - 1, before * num_parts // amounts[-1])
        if place is None:
            is_new = distinct.is_new_phrase(_plain(text[anchor.start : anchor.end]))
        else:
            covers_the_image = len(place) == 4 and (place[2] - place[0]) * (place[3] - place[1]) >= MAX_AREA
            is_new = not covers_the_image and distinct.is_new_place(place)
        if is_new:
            new.append((anchor, part))
    # Coordinates come first, in the choice of words as in what is paid without words, since they are worth more.
    own = _OwnWords(text, (start, end), found, prompt)
    new.sort(key=lambda item: item[0].coords is None)
    best, num_read = [0.0] * num_parts, 0
    without = []
    for anchor, part in new:
        if own.take(anchor):
            num_read += 1
            best[part] = max(best[part], weight(anchor))
        else:
            without.append((anchor, part))
    # A box where no phrase could be paid instead, if there is one.
    phrases = {part for anchor, part in without if anchor.coords is None}
    without.sort(key=lambda item: (item[0].coords is None, item[1] in phrases))
    allowance = 1.0 + phrase_weight
    for anchor, part in without:
        value = weight(anchor)
        if best[part] < value <= allowance:
            allowance -= value
            num_read += 1
            best[part] = value
    places_found = sum(anchor.coords is not None for anchor, _ in new)
    return AnchorScore(
        score=min(1.0, sum(best) / min(ENOUGH, num_parts)) * min(1.0, MOST_PLACES / max(1, places_found)),
        num_anchors=len(found),
        num_distinct=len(new),
        num_coordinates=places_found,
        parts_covered=len({part for _, part in new}),
        num_read=num_read,
    )
