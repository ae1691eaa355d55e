# SPDX-License-Identifier: Apache-2.0
"""Near-duplicates among samples, and questions of test sets. No Ray.

Two samples show the same if they have the same number of pictures, each with the same pixels or with difference hashes
that differ in at most `distance` bits. Equal words are not enough, because data sets often use one question template
for many pictures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from avar_verl.tools.synth.items import Item, Picture, text_hash

if TYPE_CHECKING:
    from datasketch import MinHash

NUM_PERM = 128
SHINGLE = 3


def same_pictures(a: Sequence[Picture], b: Sequence[Picture], distance: int) -> bool:
    """Whether two samples show the same."""
    return len(a) == len(b) and all(
        p.pixels == q.pixels or (p.dhash ^ q.dhash).bit_count() <= distance for p, q in zip(a, b, strict=True)
    )


def minhash(text: str) -> MinHash:
    """MinHash of the word 3-grams of a text, without case and punctuation; Chinese characters count as words."""
    from datasketch import MinHash  # imports scipy, which workers that make calls have no use for

    words = re.findall(r"[㐀-䶿一-鿿]|[^\W㐀-䶿一-鿿]+", text.casefold())
    shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
    out = MinHash(num_perm=NUM_PERM, seed=1)
    out.update_batch([shingle.encode() for shingle in sorted(shingles)])
    return out


class NearDuplicates:
    """The samples accepted so far."""

    def __init__(self, jaccard: float, distance: int):
        from datasketch import MinHashLSH

        self.lsh = MinHashLSH(threshold=jaccard, num_perm=NUM_PERM)
        self.jaccard, self.distance = jaccard, distance
        self.kept: dict[str, tuple[tuple[Picture, ...], MinHash]] = {}

    def find(self, item: Item, text: str) -> str:
        """The accepted sample that this one nearly repeats, as "SOURCE row N"; if none, "", and this one is added."""
        signature = minhash(f"{item.words} {text}")
        name = f"{item.source} row {item.row}"
        for other in sorted(self.lsh.query(signature)):
            pictures, kept = self.kept[other]
            if same_pictures(pictures, item.pictures, self.distance) and kept.jaccard(signature) >= self.jaccard:
                return other
        bare = tuple(Picture(b"", p.mime, p.width, p.height, p.pixels, p.dhash) for p in item.pictures)
        self.lsh.insert(name, signature)
        self.kept[name] = (bare, signature)
        return ""


# ---- test sets -------------------------------------------------------------------------------------------------


def hash_record(item: Item) -> dict:
    """A line of a hash list: {"text", "pixels": [...], "dhash": [...]}, which does not reveal the content."""
    return {
        "text": text_hash(item.question),
        "pixels": [picture.pixels for picture in item.pictures],
        "dhash": [f"{picture.dhash:016x}" for picture in item.pictures],
    }


def write_hashes(items: Iterable[Item], path: str | Path) -> tuple[int, int]:
    """Write a hash list as json lines; returns (questions written, unreadable rows left out)."""
    written = left_out = 0
    with open(path, "w", encoding="utf-8") as file:
        for item in items:
            if item.problem:
                left_out += 1
                continue
            file.write(json.dumps(hash_record(item)) + "\n")
            written += 1
    return written, left_out


class Overlap:
    """Hash lists of test sets.

    A question is in a test set if one of its pictures has the same pixels as a picture there, or if one is nearly equal
    (`distance` bits) and the question has the same words as a question there. Line drawings can have similar hashes,
    and templates repeat words, but both together are unlikely by chance.

    Raises:
        ValueError: a missing file, or a line that is not a record.
    """

    def __init__(self, paths: Sequence[str], distance: int):
        self.distance = distance
        self.pixels: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        hashes: list[int] = []
        for path in paths:
            name = Path(path).stem
            try:
                lines = Path(path).read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise ValueError(
                    f"an overlap list must be a file; got {path}: {error.strerror}. Make it with avar synth hashes."
                ) from error
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    self.texts.setdefault(record["text"], name)
                    for pixels, dhash in zip(record["pixels"], record["dhash"], strict=True):
                        self.pixels.setdefault(pixels, name)
                        hashes.append(int(dhash, 16))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"line {number} of {path} must be a record of avar synth hashes; got: {error}. Make it again."
                    ) from error
        self.dhash = np.unique(np.array(hashes, dtype=np.uint64))

    def find(self, item: Item) -> str:
        """Why an item is in a test set, "" if it is not."""
        for picture in item.pictures:
            if picture.pixels in self.pixels:
                return f"a picture of {self.pixels[picture.pixels]}"
        text = text_hash(item.question)
        if text in self.texts and self.dhash.size:
            for picture in item.pictures:
                bits = np.bitwise_count(self.dhash ^ np.uint64(picture.dhash))
                if int(bits.min()) <= self.distance:
                    return f"a question of {self.texts[text]}, with nearly a picture of the lists"
        return ""
