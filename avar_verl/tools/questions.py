# SPDX-License-Identifier: Apache-2.0
"""Questions with their images, and local data files in the layout of verl's RL data set."""

import hashlib
import io
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from avar_verl.data.images import as_verl_image
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
        images: the exact bytes of the image files, in the order of the placeholders.
        ground_truth: accepted answers, at least one.
        options: texts of the options A, B, ... that the question gives, empty for an open question.
        groups: names of its groups, by the metric that counts a group as correct if all of its items are.
        data_source: as in verl's data.
    """

    task: str
    id: str
    messages: tuple[dict[str, str], ...]
    images: tuple[bytes, ...]
    ground_truth: tuple[str, ...]
    options: tuple[str, ...] = ()
    groups: dict[str, str] = field(default_factory=dict)
    data_source: str = ""

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "user":
            raise ValueError(
                f"a prompt must end with a turn of the user; got roles {[m['role'] for m in self.messages]} in item "
                f"{self.id} of {self.task}. Leave the answer out of the prompt."
            )
        with naming(f"item {self.id} of {self.task}"):
            self._placed(self.images)

    def prompt_hash(self) -> str:
        """SHA-256 of messages, image bytes, answers, options and groups, which identifies the question of a record."""
        digest = hashlib.sha256()
        for part in (self.messages, self.ground_truth, self.options, sorted(self.groups.items())):
            digest.update(repr(part).encode() + b"\0")
        for image in self.images:
            digest.update(hashlib.sha256(image).digest())
        return digest.hexdigest()

    def _placed(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        return place_images(read_messages(list(self.messages)), images)

    def chat(self) -> list[dict[str, Any]]:
        """The messages for OpenAI's chat API, with images as data URIs of their exact bytes."""
        chat = []
        for turn in self._placed([data_uri(image) for image in self.images]):
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


def data_uri(content: bytes) -> str:
    """`data:image/png;base64,...` of an image file.

    Raises:
        ValueError: bytes that are not an image that Pillow knows.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = Image.MIME[image.format]
    except (UnidentifiedImageError, KeyError) as error:
        raise ValueError(
            f"an image must be in a format that Pillow knows; got {len(content)} bytes that start with "
            f"{content[:8]!r}. Convert it to PNG or JPEG."
        ) from error
    return f"data:{kind};base64,{b64encode(content).decode()}"


def _image_bytes(value: Any) -> bytes:
    held = as_verl_image(value, embed=True)
    if "bytes" not in held:
        raise ValueError(
            f"images must be bytes or files on this machine; got {str(held.get('image'))[:60]!r}. Embed them."
        )
    return held["bytes"]


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
        images=tuple(map(_image_bytes, as_list(values.get("images")))),
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
