# SPDX-License-Identifier: Apache-2.0
"""Inputs: rows of any data file as items, with ids derived from their content. No Ray.

An unusable row becomes an item with a `problem`, so no row is lost.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from avar_verl.data.images import as_verl_image, open_image
from avar_verl.data.messages import IMAGE, as_list, marked, text_of
from avar_verl.data.rows import data_files, read_rows
from avar_verl.rewards.accuracy import accepted_answers
from avar_verl.tools.synth.config import InputConfig

# Formats that endpoints read; others are sent as PNG.
SENT_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}

Box = Sequence[float]


@dataclass(frozen=True)
class Picture:
    """An image of an item: the bytes that are sent and stored, and its hashes.

    `pixels` is SHA-256 of size and RGB values, 32 hexadecimal digits of it; `dhash` the difference hash, 64 bits.
    """

    data: bytes
    mime: str
    width: int
    height: int
    pixels: str
    dhash: int


@dataclass(frozen=True)
class Item:
    """One question about pictures.

    `source` and `row` locate it; `question` has a marker for every picture; `boxes` has a list for every picture, or is
    empty; `problem` says why the item cannot be used, "" if it can.
    """

    source: str
    row: int
    question: str = ""
    answers: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    boxes: tuple[tuple[Box, ...], ...] = ()
    problem: str = ""

    @property
    def words(self) -> str:
        """The question without markers."""
        return self.question.replace(IMAGE, "").strip()

    @property
    def id(self) -> str:
        """Id derived only from the content: the same question about the same pixels is the same item."""
        content = [self.question, self.answers, [picture.pixels for picture in self.pictures], self.boxes]
        if self.problem:
            content += [self.source, self.row]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


# ---- recognising -----------------------------------------------------------------------------------------------


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 grey cells is darker than its right neighbour. It survives scaling and encoding.

    >>> difference_hash(Image.new("RGB", (20, 20)))
    0
    """
    grey = image.convert("L").resize((9, 8), Image.BILINEAR).tobytes()
    bits = [grey[9 * y + x] < grey[9 * y + x + 1] for y in range(8) for x in range(8)]
    return sum(bit << place for place, bit in enumerate(bits))


def text_hash(text: str) -> str:
    """Hash of the words of a text, without case, width, punctuation and markers; 32 hexadecimal digits."""
    folded = unicodedata.normalize("NFKC", text.replace(IMAGE, " ")).casefold()
    return hashlib.sha256(" ".join(re.findall(r"\w+", folded)).encode()).hexdigest()[:32]


def make_picture(value: Any, *, root: str | None = None, allow_urls: bool = False) -> Picture:
    """A row's image, decoded once as a check; its original bytes are kept if endpoints can read them.

    Raises:
        ValueError: what `open_image` refuses.
    """
    image = open_image(value, allow_urls=allow_urls, root=root)
    data, kind = _own_bytes(value, root)
    if kind not in SENT_FORMATS:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data, kind = buffer.getvalue(), "PNG"
    size = f"{image.width}x{image.height}:".encode()
    pixels = hashlib.sha256(size + image.tobytes()).hexdigest()[:32]
    return Picture(data, SENT_FORMATS[kind], *image.size, pixels, difference_hash(image))


def _own_bytes(value: Any, root: str | None) -> tuple[bytes, str]:
    """The encoded file of an image and its format, if available; else (b"", "")."""
    held = as_verl_image(value, embed=True, root=root).get("bytes")
    if held is None:
        return b"", ""
    with Image.open(io.BytesIO(held)) as image:
        # Only RGB: endpoints treat transparency differently, and open_image makes it white.
        return (held, image.format) if image.mode in ("RGB", "L") else (b"", "")


# ---- reading ---------------------------------------------------------------------------------------------------


def _field(values: Mapping[str, Any], path: str) -> Any:
    """Value at a dotted path; None if a part of the path is missing."""
    for name in path.split("."):
        if not isinstance(values, Mapping):
            return None
        values = values.get(name)
    return values


def _question(value: Any) -> str:
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, Mapping) and turn.get("role") == "user"]
        value = turns[-1].get("content") if turns else None
    text = "" if value is None else text_of(value).strip()
    if not text.replace(IMAGE, "").strip():
        raise ValueError(f"a question must have words; got {value!r}. Name its column with input.question.")
    return text


def _boxes(value: Any, pictures: Sequence[Picture]) -> tuple[tuple[Box, ...], ...]:
    if value is None:
        return ()
    value = [[] if boxes is None else boxes for boxes in value]
    if len(pictures) == 1 and any(box and isinstance(box[0], int | float) for box in value):
        value = [value]  # the layout of GRPO rows: the boxes of the one image
    if len(value) != len(pictures):
        raise ValueError(
            f"boxes must be a list for every image; got {len(value)} for {len(pictures)}. Correct the row."
        )
    for boxes, picture in zip(value, pictures, strict=True):
        for box in boxes:
            ok = len(box) == 4 and 0 <= box[0] < box[2] <= picture.width and 0 <= box[1] < box[3] <= picture.height
            if not ok:
                size = (picture.width, picture.height)
                raise ValueError(
                    f"a box must be (x1, y1, x2, y2) within its image of {size}; got {box}. Correct the row."
                )
    return tuple(tuple(tuple(box) for box in boxes) for boxes in value)


def make_item(source: str, row: int, values: Mapping[str, Any], config: InputConfig) -> Item:
    """The item of a row; `problem` says what is wrong with the row."""
    try:
        question = _question(_field(values, config.question))
        answers = tuple(accepted_answers(_field(values, config.answer), "this row"))
        images = as_list(_field(values, config.images))
        if not images:
            raise ValueError(f"an item must have an image; got none in {config.images!r}. Name it with input.images.")
        question = marked(question, len(images))
        if question.count(IMAGE) != len(images):
            raise ValueError(
                f"a question must have a {IMAGE} for every image; got {question.count(IMAGE)} for {len(images)}. "
                "Correct the row."
            )
        pictures = tuple(make_picture(image, root=config.root, allow_urls=config.allow_urls) for image in images)
        boxes = _boxes(_field(values, config.boxes), pictures) if config.boxes else ()
    except (ValueError, TypeError, OSError) as error:  # TypeError: accepted_answers; OSError: a file that went away.
        return Item(source, row, str(_field(values, config.question) or "")[:2000], problem=str(error))
    return Item(source, row, question, answers, pictures, boxes)


def read_items(config: InputConfig, files: Sequence[str] | None = None, limit: int = 0) -> Iterator[Item]:
    """Items of `files` (default: all of the config), in order.

    Raises:
        ValueError: a missing or unreadable file (`data.rows`).
    """
    for number, row in enumerate(read_rows(config.files if files is None else files)):
        if limit and number >= limit:
            return
        yield make_item(str(row.file), row.number, row.values, config)


def input_files(config: InputConfig) -> list[str]:
    """The files of the config, including those in folders."""
    return [str(path) for path in data_files(config.files)]


# ---- Ray rows --------------------------------------------------------------------------------------------------


def pack(item: Item) -> dict[str, Any]:
    """The item as a row of plain text and bytes, which Arrow does not change."""
    values = asdict(item)
    blobs = [picture.pop("data") for picture in values["pictures"]]
    return {"id": item.id, "item": json.dumps(values), "blobs": blobs}


def unpack(row: Mapping[str, Any]) -> Item:
    """The item of a packed row."""
    values = json.loads(row["item"])
    pictures = tuple(
        Picture(data=bytes(blob), **picture) for picture, blob in zip(values["pictures"], row["blobs"], strict=True)
    )
    boxes = tuple(tuple(tuple(box) for box in boxes) for boxes in values["boxes"])
    return Item(**{**values, "answers": tuple(values["answers"]), "pictures": pictures, "boxes": boxes})
