# SPDX-License-Identifier: Apache-2.0
"""The reader of conversations: turns of text or blocks, and the places of their images.

In a data file, text marks an image with `<image>`; a chat template needs blocks, `{"type": "text", "text": ...}` and
`{"type": "image", "image": ...}`. In a list of blocks, the blocks define the places of images, and `<image>` in their
text is ordinary text. No verl, no torch.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

IMAGE = "<image>"
# Types of blocks other than text, and the columns with their content.
MEDIA = {"image": "images", "video": "videos"}
# Keys of a turn that say whether it is trained on.
FLAGS = ("loss_mask", "trainable")
_MARKER = re.compile(f"<({'|'.join(MEDIA)})>")


def shown(value: Any) -> str:
    """A value for an error message, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def plain(value: Any) -> Any:
    """A value with Python lists and numbers instead of numpy's, which pandas creates from parquet.

    >>> import numpy
    >>> plain({"content": numpy.array(["a"], dtype=object)})
    {'content': ['a']}
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def as_list(value: Any) -> list[Any]:
    """The images of a column, which may have a list, one image, or None."""
    value = plain(value)
    return value if isinstance(value, list) else [] if value is None else [value]


def marked(text: str, num_images: int) -> str:
    """The text with markers for its images; without markers, all images come first.

    >>> marked("What?", 2), marked("What is <image>?", 1)
    ('<image><image>What?', 'What is <image>?')
    """
    return text if IMAGE in text else IMAGE * num_images + text


def _block(block: Mapping[str, Any]) -> dict[str, Any]:
    block = {key: value for key, value in block.items() if value is not None}
    if block.get("type") == "image_url":  # OpenAI's name, which qwen_vl_utils reads too.
        block["type"] = "image"
    if block.get("type") not in ("text", *MEDIA):
        raise ValueError(f"a block must have the type text, image or video; got {shown(block)}. Leave the block out.")
    if block["type"] == "text":
        if not isinstance(block.get("text"), str):
            raise ValueError(f"a text block must hold text; got {shown(block)}. Write it, or leave the block out.")
        if others := sorted(block.keys() & {*MEDIA, "image_url"}):
            raise ValueError(f"a text block must hold no image; got {others}. Give the image a block of its own.")
    return block


def blocks_of(content: Any, markers: bool = False) -> list[dict[str, Any]]:
    """The content of a message as new blocks, without keys whose value is None, which parquet adds.

    Args:
        markers: `<image>` and `<video>` in text mark an image and a video, as in data files. Otherwise they are
            ordinary text, as in model output.

    Raises:
        ValueError: content that is neither text nor a list of blocks, or a block of another type.

    >>> blocks_of("<image>What?", markers=True)
    [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]
    >>> blocks_of("<image>What?")
    [{'type': 'text', 'text': '<image>What?'}]
    """
    content = plain(content)
    if isinstance(content, str):
        if not markers:
            return [{"type": "text", "text": content}]
        parts = enumerate(_MARKER.split(content))  # Every second part is the name of a marker.
        return [{"type": part} if at % 2 else {"type": "text", "text": part} for at, part in parts if part]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise ValueError(f"content must be text or a list of blocks; got {shown(content)}. Write text.")
    return [_block(block) for block in content]


def text_of(content: Any) -> str:
    """The content of a message as text with `<image>` for each image; the inverse of `blocks_of` with markers.

    Raises:
        ValueError: anything that `blocks_of` refuses, or a text block that contains a marker, which would become an
            image.

    >>> text_of([{"type": "image"}, {"type": "text", "text": "What?"}])
    '<image>What?'
    """
    if isinstance(content, str):
        return content
    blocks = blocks_of(content)
    spelled = [block["text"] for block in blocks if _MARKER.search(block.get("text", ""))]
    if spelled:
        raise ValueError(f"the text of a block must not spell a marker; got {shown(spelled[0])}. Spell it differently.")
    return "".join(block.get("text", f"<{block['type']}>") for block in blocks)


def turns_of(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """The turns of a conversation as written, each with a role and content. `name` is the name of the column.

    Raises:
        ValueError: not a list, no turn, or a turn without role or content.
    """
    messages = plain(messages)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{name}` must be a list of turns; got {shown(messages)}. Write role and content of each.")
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise ValueError(f"a turn must have role and content; got {shown(turn)} as turn {number}. Write both.")
    return messages


def other_keys(turn: Mapping[str, Any]) -> list[str]:
    """Keys of a turn that nothing reads, such as tool calls, whatever their value. Parquet writes None for no key."""
    return sorted(key for key, value in turn.items() if value is not None and key not in ("role", "content", *FLAGS))


def is_trained(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is trained on: assistant turns are, unless `loss_mask` is 0 or `trainable` false.

    Raises:
        ValueError: a flag that is neither 0 nor 1, flags that disagree, or one that trains on another role.

    >>> is_trained({"role": "assistant", "content": "cat"}), is_trained({"role": "assistant", "loss_mask": 0})
    (True, False)
    """
    flags = {name: turn[name] for name in FLAGS if turn.get(name) is not None}
    unknown = {name: value for name, value in flags.items() if value not in (0, 1)}
    if unknown:
        raise ValueError(f"a turn's {' and '.join(FLAGS)} must be 0 or 1; got {shown(unknown)}. Write one of them.")
    values = {bool(value) for value in flags.values()}
    if len(values) > 1:
        raise ValueError(f"a turn's {' and '.join(FLAGS)} must agree; got {shown(flags)}. Keep one of them.")
    answers = turn["role"] == "assistant"
    if True in values and not answers:
        raise ValueError(
            f"only assistant turns are trained on; got {shown(flags)} in a {turn['role']} turn. Take the flag out."
        )
    return answers and False not in values


def read_messages(messages: Any, name: str = "messages", *, markers: bool = True) -> list[dict[str, Any]]:
    """A conversation with blocks as content (`blocks_of`).

    With `markers`, as in data files, a turn may have only role, content and FLAGS (`is_trained`); otherwise other keys
    are kept.

    Raises:
        ValueError: anything that `turns_of` or `blocks_of` refuses, or (with `markers`) other keys or wrong flags; the
            message names the turn.
    """
    out = []
    for number, turn in enumerate(turns_of(messages, name)):
        if markers and (others := other_keys(turn)):
            raise ValueError(
                f"a turn must have a role and content and nothing else; got {others} in turn {number}. Write tool "
                f"calls and reasoning as content; only {' and '.join(FLAGS)} may be beside it."
            )
        try:
            blocks = blocks_of(turn["content"], markers)
            if markers:
                is_trained(turn)
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from error
        kept = {key: value for key, value in turn.items() if key in FLAGS and value is not None} if markers else turn
        out.append({**kept, "role": turn["role"], "content": blocks})
    return out


def check_kinds(kinds: Iterable[str]) -> None:
    """Refuse everything but text and images: every entrance of samples (rows of both stages, prompts of rollouts, what
    is measured) asks here.

    Raises:
        ValueError: a video, or audio.
    """
    others = sorted({*kinds} - {"text", "image"})
    if others:
        raise ValueError(f"a conversation must hold text and images; got a {others[0]}. Leave the row out.")


def place_images(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any], open_one: Callable[[Any], Any] | None = None
) -> list[dict[str, Any]]:
    """A conversation of blocks with `images` in its image blocks, in order, each opened by `open_one`.

    Raises:
        ValueError: different numbers of images and image blocks, a video, or anything that `open_one` refuses.
    """
    kinds = [block["type"] for message in messages for block in message["content"]]
    check_kinds(kinds)
    if kinds.count("image") != len(images):
        raise ValueError(
            f"a conversation must name each of its images once with {IMAGE}; got {kinds.count('image')} markers for "
            f"{len(images)} images. Correct the row or leave it out."
        )
    opened = iter(images if open_one is None else map(open_one, images))
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": next(opened)} if block["type"] == "image" else block
                for block in message["content"]
            ],
        }
        for message in messages
    ]


def template_kwargs(tools: Any, enable_thinking: Any) -> dict[str, Any]:
    """Arguments of the chat template from the columns of a row; {} if they are empty."""
    thinking = {} if enable_thinking is None else {"enable_thinking": bool(enable_thinking)}
    return {**({"tools": tools} if tools else {}), **thinking}


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The images of a conversation's image blocks, in order."""
    blocks = (block for message in messages for block in blocks_of(message["content"]))
    return [block["image"] for block in blocks if block["type"] == "image"]
