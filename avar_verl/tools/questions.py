# SPDX-License-Identifier: Apache-2.0
"""Questions with their images, and local data files in the layout of verl's RL data set."""

import hashlib
import io
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from avar_verl.data.images import as_verl_image, open_image
from avar_verl.data.messages import as_list, place_images, read_messages, text_of, turns_of
from avar_verl.data.rows import Row, naming, read_rows
from avar_verl.rewards.accuracy import accepted_answers, answer_options


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        task: name of its task.
        id: unique within the task, the same in every run.
        messages: `{"role": ..., "content": text}` in order; `<image>` marks the next image.
        sources: the images as the data hold them, in the order of the placeholders: bytes of a file, or a dict of bytes
            and limits such as `min_pixels`.
        ground_truth: accepted answers, at least one.
        options: texts of the options A, B, ... that the question gives, empty for an open question.
        groups: names of its groups, by the metric that counts a group as correct if all of its items are.
        data_source: as in verl's data.
        patch_size: of the model's image processor, for the size of the pictures (`plugin.datasets.images`).
    """

    task: str
    id: str
    messages: tuple[dict[str, str], ...]
    sources: tuple[Any, ...]
    ground_truth: tuple[str, ...]
    options: tuple[str, ...] = ()
    groups: dict[str, str] = field(default_factory=dict)
    data_source: str = ""
    patch_size: int = field(default=14, compare=False)

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "user":
            raise ValueError(
                f"a prompt must end with a turn of the user; got roles {[m['role'] for m in self.messages]} in item "
                f"{self.id} of {self.task}. Leave the answer out of the prompt."
            )
        with naming(f"item {self.id} of {self.task}"):
            self._placed(self.sources)

    def prompt_hash(self) -> str:
        """SHA-256 of messages, images as the data hold them, answers, options and groups, which identifies the question
        of a record, whatever the model."""
        digest = hashlib.sha256()
        for part in (self.messages, self.ground_truth, self.options, sorted(self.groups.items())):
            digest.update(repr(part).encode() + b"\0")
        for source in self.sources:
            limits = dict(source) if isinstance(source, dict) else {}
            digest.update(hashlib.sha256(limits.pop("bytes", source)).digest())
            digest.update(repr(sorted(limits.items())).encode() if limits else b"")
        return digest.hexdigest()

    def pictures(self) -> list[Image.Image]:
        """The images as training makes them from the data: the same pixels, in the same size."""
        from avar_verl.plugin.datasets.images import open_resized  # Imports verl, which takes seconds.

        return [open_resized(source, self.patch_size) for source in self.sources]

    @property
    def images(self) -> tuple[bytes, ...]:
        """`pictures` as PNG files."""
        return tuple(map(png, self.pictures()))

    def _placed(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        return place_images(read_messages(list(self.messages)), images)

    def chat(self) -> list[dict[str, Any]]:
        """The messages for OpenAI's chat API, with `pictures` as data URIs."""
        chat = []
        for turn in self._placed([data_uri(picture) for picture in self.pictures()]):
            parts = [
                {"type": "image_url", "image_url": {"url": block["image"]}} if block["type"] == "image" else block
                for block in turn["content"]
            ]
            plain = [part["type"] for part in parts] == ["text"]
            chat.append({"role": turn["role"], "content": parts[0]["text"] if plain else parts})
        return chat


@dataclass(frozen=True)
class Reply:
    """A model's answer to one question.

    Attributes:
        text: without special tokens.
        finish_reason: "stop", or "length" for one that was cut off.
        prompt_tokens: including image tokens; None if the server does not report them.
        response_tokens: likewise.
        attempts: number of requests.
        seconds: from the first request on, including retries; of the whole batch if several are answered at once.
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None
    response_tokens: int | None
    attempts: int = 1
    seconds: float = field(default=0.0, compare=False)


def png(image: Image.Image) -> bytes:
    """A PNG file of an image, with the exact pixels and nothing else."""
    buffer = io.BytesIO()
    image = image.copy()
    image.info.clear()  # Pillow would write what the file said about its palette or its orientation.
    image.save(buffer, "PNG", compress_level=1)  # Time is dearer than the way to the server.
    return buffer.getvalue()


def data_uri(image: Any) -> str:
    """`data:image/png;base64,...` of an image of a row, as `open_image` opens it. A server that opened the file itself
    would turn it, or show what is transparent, in its own way.

    Raises:
        ValueError: anything that `open_image` refuses.
    """
    return f"data:image/png;base64,{b64encode(png(open_image(image))).decode()}"


def _source(value: Any) -> Any:
    """An image of a row, on its own: the bytes of its file, with its limits if it has any."""
    held = {key: item for key, item in as_verl_image(value, embed=True).items() if item is not None}
    if "bytes" not in held:
        raise ValueError(
            f"images must be bytes or files on this machine; got {str(held.get('image'))[:60]!r}. Embed them."
        )
    return held if len(held) > 1 else held["bytes"]


def _row_question(task: str, row: Row) -> Question:
    values = row.values
    missing = [key for key in ("prompt", "reward_model") if not values.get(key)]
    if missing or "ground_truth" not in values["reward_model"]:
        raise ValueError(
            f"a row must have prompt and reward_model.ground_truth, as verl's RL data; got columns {sorted(values)}. "
            "See docs/data.md."
        )
    turns = turns_of(values["prompt"], "prompt")
    options = answer_options(values.get("extra_info"), "this row")
    truth = tuple(accepted_answers(values["reward_model"]["ground_truth"], "this row", options))
    return Question(
        task=task,
        id=str(row.number),
        messages=tuple({"role": turn["role"], "content": text_of(turn["content"])} for turn in turns),
        sources=tuple(map(_source, as_list(values.get("images")))),
        ground_truth=truth,
        options=options,
        data_source=str(values.get("data_source") or ""),
    )


def file_questions(path: Path) -> Iterator[Question]:
    """The rows of a data file in verl's RL layout, one at a time; the task is named after the file.

    Raises:
        ValueError: a row without a prompt or an answer, placeholders that do not match the images, or a missing image;
            the message names the row.
    """
    for row in read_rows(path):
        with naming(row.where):
            question = _row_question(path.stem, row)
        yield question
