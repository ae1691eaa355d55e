# SPDX-License-Identifier: Apache-2.0
"""Prompts: jinja files with the blocks `system` and `user`, rendered to the messages of a request.

Variables: `question` (without image markers), `answer` (accepted answers, joined by " or "), `num_images`, `boxes`
(texts "[x1, y1, x2, y2]", preceded by the number of the image if there are several), `coordinates`, and the outputs of
earlier stages: `description`, `reasoning`, `final_answer`. The stage's images come before the user text.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError

from avar_verl.tools.report import environment
from avar_verl.tools.synth.config import StageConfig, SynthConfig
from avar_verl.tools.synth.items import Item

FOLDER = Path(__file__).parent / "prompts"
_CHAIN = re.compile(r"<reasoning>(.*)</reasoning>\s*<answer>(.*)</answer>", re.DOTALL)


class PromptFile(NamedTuple):
    """A prompt file: `name` with its version (describe_v1), `digest` of its text, and the template."""

    name: str
    digest: str
    template: Template


@functools.cache
def load_prompt(name: str) -> PromptFile:
    """A shipped prompt by name, or your own file.

    Raises:
        ValueError: an unknown prompt, one that jinja cannot parse, or one without the block `user`.
    """
    path = Path(name) if name.endswith(".jinja") else FOLDER / f"{name}.jinja"
    if not path.is_file():
        shipped = sorted(file.stem for file in FOLDER.glob("*.jinja"))
        raise ValueError(f"a prompt must be one of {shipped} or a .jinja file; got {name!r}. Name one.")
    text = path.read_text(encoding="utf-8")
    try:
        template = environment(html=False).from_string(text)
    except TemplateError as error:
        raise ValueError(f"{path} must be a jinja template; got: {error}. Correct it.") from error
    if "user" not in template.blocks:
        raise ValueError(f"a prompt must have the block user; got {sorted(template.blocks)} in {path}. Add it.")
    return PromptFile(path.stem, hashlib.sha256(text.encode()).hexdigest()[:12], template)


def box_texts(item: Item, coordinates: str) -> list[str]:
    """Reference boxes of an item in the format of prompts and answers."""
    out = []
    for number, boxes in enumerate(item.boxes):
        picture = item.pictures[number]
        for box in boxes:
            if coordinates == "relative_1000":
                sides = (picture.width, picture.height) * 2
                box = [round(1000 * value / side) for value, side in zip(box, sides, strict=True)]
            text = "[" + ", ".join(f"{value:g}" for value in box) + "]"
            out.append(f"image {number + 1}: {text}" if len(item.pictures) > 1 else text)
    return out


def render(stage: StageConfig, item: Item, coordinates: str, earlier: dict[str, str]) -> list[dict[str, str]]:
    """`[{"role", "content"}]` of a request, only text.

    Raises:
        ValueError: a variable that does not exist at this stage.
    """
    prompt = load_prompt(stage.prompt)
    variables: dict[str, Any] = {
        "question": item.words,
        "answer": " or ".join(item.answers),
        "num_images": len(item.pictures),
        "boxes": box_texts(item, coordinates),
        "coordinates": coordinates,
        **earlier,
    }
    messages = []
    for role in ("system", "user"):
        if role not in prompt.template.blocks:
            continue
        context = prompt.template.new_context(variables)
        try:
            content = "".join(prompt.template.blocks[role](context)).strip()
        except TemplateError as error:
            raise ValueError(
                f"prompt {prompt.name} must render; got: {error}. It can use {sorted(variables)}."
            ) from error
        messages.append({"role": role, "content": content})
    return messages


def parse_chain(text: str) -> tuple[str, str] | None:
    """(reasoning, answer) of an answer of stage 2 or 3, None if it has a different form.

    The model's own thinking, up to `</think>`, is removed; an answer with tags inside the reasoning has a different
    form.

    >>> parse_chain("<think>hm</think><reasoning>One and one.</reasoning> <answer>2</answer>")
    ('One and one.', '2')
    """
    match = _CHAIN.fullmatch(text.rpartition("</think>")[2].strip())
    if match is None:
        return None
    reasoning, answer = match[1].strip(), match[2].strip()
    if not reasoning or not answer or re.search(r"</?(?:think|answer|reasoning)>", reasoning + answer):
        return None
    return reasoning, answer


def parse_description(text: str) -> str:
    """A description without the model's own thinking."""
    return text.rpartition("</think>")[2].strip()


def versions(config: SynthConfig) -> dict[str, str]:
    """Prompt of every stage, with the digest of its text."""
    from avar_verl.tools.synth.config import STAGES

    prompts = {name: load_prompt(config.stage(name).prompt) for name in STAGES}
    return {name: f"{prompt.name} ({prompt.digest})" for name, prompt in prompts.items()}
