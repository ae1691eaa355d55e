# SPDX-License-Identifier: Apache-2.0
"""Rows as conversations: data files in verl's layouts, or a data set on the hub.

Images are opened as the trainers open them (docs/data.md).
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from avar_verl.data.messages import as_list, images_of, marked, place_images, read_messages, template_kwargs
from avar_verl.data.rows import SUFFIXES, Row, count_rows, data_files, read_rows
from avar_verl.plugin.datasets.images import open_resized

# Columns with a conversation, in the order in which a row is searched, and the columns that may accompany each.
CONVERSATIONS = ("messages", "prompt", "question")
COLUMNS = (*CONVERSATIONS, "images", "image", "response", "response_ids", "tools", "enable_thinking")


@dataclass(frozen=True)
class Conversation:
    """A row as a conversation.

    prompt: messages with images in their blocks, up to the response.
    response: the answering message, or None.
    response_ids: the answer as token ids, or None.
    turns: whether every assistant turn is a response (rows with `messages`), not only the last one.
    template_kwargs: for the chat template.
    """

    prompt: list[dict]
    response: str | list[dict] | None = None
    response_ids: list[int] | None = None
    turns: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def answered(self, response: str | None = None) -> list[dict]:
        """The messages with `response` (default: the conversation's own) as the answer, if there is one."""
        response = self.response if response is None else response
        return self.prompt if response is None else [*self.prompt, {"role": "assistant", "content": response}]

    @property
    def images(self) -> list[Image.Image]:
        """In order of appearance."""
        return images_of(self.answered())

    @property
    def digest(self) -> str:
        """Sixteen hex digits that identify the prompt's text and pixels, regardless of the answer."""
        digest = hashlib.sha256()
        for message in self.prompt:
            for block in message["content"]:
                is_image = block["type"] == "image"
                content = block["image"].tobytes() if is_image else block["text"].encode("utf-8", "surrogatepass")
                shape = str(block["image"].size) if is_image else ""
                digest.update(f"{message['role']}/{block['type']}{shape}/{len(content)}/".encode())
                digest.update(content)
        return digest.hexdigest()[:16]


def is_file(data: str) -> bool:
    """Whether `data` names files on this machine; otherwise it is a data set on the hub."""
    return Path(data).exists() or Path(data).suffix in SUFFIXES or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data)


def _hub_rows(name: str, split: str | None) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    if split is None:
        raise ValueError(f"a data set of the hub has splits; got none for {name!r}. Pass --split, for example test.")
    try:
        # Streaming: the first rows are available before the last ones are downloaded. Images are PIL.
        yield from load_dataset(name, split=split, streaming=True)
    except (ConnectionError, FileNotFoundError) as error:  # DatasetNotFoundError is a FileNotFoundError.
        raise ValueError(
            f"data must be a file on this machine or a data set that the hub serves; got {name!r}: {error}. Check the "
            "path or the name, and the connection."
        ) from error


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The columns that a row is read from, under their standard names; `columns` maps a name of COLUMNS to the name in
    the data.

    Raises:
        ValueError: a column that the row does not have.
    """
    missing = sorted(set(columns.values()) - set(values))
    if missing:
        raise ValueError(f"columns must be those of the data; got {missing} for {sorted(values)}. Correct --columns.")
    # A column that has one of these names in the data, but is not the mapped one, must not be used instead.
    out = {name: values[name] for name in COLUMNS if name in values and name not in columns.values()}
    if any(name in CONVERSATIONS for name in columns):
        out = {name: value for name, value in out.items() if name not in CONVERSATIONS}
    if {"images", "image"} & set(columns):
        out = {name: value for name, value in out.items() if name not in ("images", "image")}
    return {**out, **{name: values[column] for name, column in columns.items()}}


def read(data: str, split: str | None = None, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of a file, a folder of files or a data set on the hub, in order and lazily.

    Raises:
        ValueError: anything that `read_rows` refuses, a split for a file, a data set that the hub does not serve, or a
            missing column.
    """
    if is_file(data):
        if split is not None:
            raise ValueError(f"splits are those of data sets of the hub; got split={split!r} for {data}. Leave it out.")
        rows = read_rows(data)
    else:
        rows = (Row(data, number, values, number) for number, values in enumerate(_hub_rows(data, split)))
    for row in rows:
        yield row._replace(values=renamed(row.values, columns or {}))


def count(data: str) -> int | None:
    """Number of rows of the data, for a progress bar; None if unknown in advance."""
    return count_rows(data_files(data)) if is_file(data) else None


def conversation(values: Mapping[str, Any], patch_size: int = 14, system: str | None = None) -> Conversation:
    """The conversation of a row.

    `messages` (cold start): the last turn is the response if it is an assistant turn. `prompt` (GRPO): messages or
        text,
    with the response as text in `response` or as token ids in `response_ids`. `question`: text, images in `images` or
    `image`, a response as for `prompt`.

    Args:
        patch_size: of the image processor, see `verl.utils.dataset.vision_utils.process_image`.
        system: a system turn for conversations that have none.

    Raises:
        ValueError: no conversation, one that does not match its images, two responses, or an image that cannot be
            opened.
    """
    column = next((name for name in CONVERSATIONS if values.get(name) is not None), None)
    if column is None:
        raise ValueError(
            f"a row must have one of the columns {list(CONVERSATIONS)}; got {sorted(values)}. Name it, for example "
            "--columns question=query."
        )
    messages, images = values[column], as_list(values.get("image" if values.get("images") is None else "images"))
    if isinstance(messages, str) and column != "messages":
        messages = [{"role": "user", "content": marked(messages, len(images))}]
    built = place_images(read_messages(messages, column), images, lambda image: open_resized(image, patch_size))
    if system is not None and built[0]["role"] != "system":
        built.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    response, response_ids = values.get("response"), values.get("response_ids")
    ends_with_answer = built[-1]["role"] == "assistant"
    given = [ends_with_answer, response is not None, response_ids is not None]
    if sum(given) > 1:
        raise ValueError(
            "a row must have one response: the last message, `response` or `response_ids`; got "
            f"{[name for name, there in zip(('message', 'response', 'response_ids'), given, strict=True) if there]}. "
            "Keep one of them."
        )
    if ends_with_answer:
        response = built.pop()["content"]
    ids = None if response_ids is None else [int(token) for token in response_ids]
    kwargs = template_kwargs(values.get("tools"), values.get("enable_thinking"))
    return Conversation(built, response, ids, column == "messages", kwargs)
