# SPDX-License-Identifier: Apache-2.0
"""The page of rollouts: one HTML file with every rollout and every distinct image once.

Reads what the trainer writes to `trainer.rollout_data_dir` (`plugin.trainer.rollouts`). verl's own dumps have no images
and, in `trainer.rollout_data_dir`, no parts; they can be read too.
"""

import json
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from avar_verl.data.images import open_image
from avar_verl.data.rows import Row, naming, read_rows
from avar_verl.tools.marks import anchor_spans, pieces
from avar_verl.tools.progress import progress
from avar_verl.tools.report import page, printable, thumbnail_uri
from avar_verl.tools.rollouts.command import Show

REWARD, ADVANTAGE = "reward", "advantage"
# Columns that are no parts of a reward, in dumps that have parts as columns (verl's `trainer.validation_data_dir`).
NO_PARTS = ("input", "output", "gts", "score", "step", "uid", "data_source", "correct", "reward", ADVANTAGE)
RIGHT_ABOVE = 0.5  # Of `acc`, in dumps that do not say which answers are right.


class Pictures:
    """The distinct images of a page by their reference, as data URIs with (width, height) as stored."""

    def __init__(self, side: int):
        self.side = side
        self.uris: list[str] = []
        self._known: dict[str, tuple[int, tuple[int, int]]] = {}

    def add(self, reference: str, folder: Path) -> tuple[int, tuple[int, int]]:
        """Index and size of an image.

        Raises:
            ValueError: the file is missing or no image.
        """
        key = str(folder / reference)
        if key not in self._known:
            image: Image.Image = open_image(key)
            self._known[key] = (len(self.uris), image.size)
            lossless = Path(key).suffix == ".png" and max(image.size) <= self.side
            self.uris.append(thumbnail_uri(image, self.side, lossless))
        return self._known[key]


def _number(value: Any) -> float | None:
    if isinstance(value, Real) and math.isfinite(value):
        return round(float(value), 6)
    return None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    found = {name: _number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def _text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _values(row: Mapping[str, Any], parts: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Numbers of the reward, and those of attention."""
    total = {REWARD: row["score"], ADVANTAGE: row.get(ADVANTAGE)}
    return _numbers({**parts, **total}), _numbers(row.get("visual") or {})


def _prompt(row: Row, pictures: Pictures) -> dict[str, Any]:
    """What the rollouts of a prompt share: question, right answer, images with size and reference boxes."""
    values = row.values
    info = values.get("extra_info") or {}
    images = values.get("images") or []
    stored = [image for image in images if "://" not in image]
    added = [pictures.add(image, row.file.parent) for image in stored]
    seen = info.get("image_sizes") or []
    sizes = [size for _, size in added] if len(seen) != len(images) or len(stored) != len(images) else seen
    boxes = []
    if len(added) == len(images) == 1 and info.get("boxes_size"):
        across, down = sizes[0][0] / info["boxes_size"][0], sizes[0][1] / info["boxes_size"][1]
        boxes = [[x1 * across, y1 * down, x2 * across, y2 * down] for x1, y1, x2, y2 in info.get("boxes") or []]
    return {
        "question": _text(info.get("prompt_text") or values.get("input") or ""),
        "answer": "" if values.get("gts") is None else _text(values["gts"]),
        "source": _text(values.get("data_source") or ""),
        "images": [[index, *size] for (index, _), size in zip(added, sizes, strict=True)],
        "elsewhere": [_text(image) for image in images if "://" in image],
        "boxes": boxes,
    }


def _rollout(row: Row, prompt: Mapping[str, Any], coordinates: str, pictures: Pictures) -> dict[str, Any]:
    """What a rollout has of its own; text in pieces, places in pixels of the prompt's image; images of tools."""
    values = row.values
    parts = values["parts"] if "parts" in values else {k: v for k, v in values.items() if k not in NO_PARTS}
    reward, visual = _values(values, parts)
    correct = values.get("correct")
    if "correct" not in values and "acc" in reward:
        correct = reward["acc"] > RIGHT_ABOVE
    text = printable(values["output"])
    size = tuple(prompt["images"][0][1:]) if len(prompt["images"]) == 1 and not prompt["elsewhere"] else None
    spans, places = anchor_spans(text, size, coordinates)
    notes = {name: part for name, part in parts.items() if isinstance(part, str) and part}
    return {
        "correct": correct,
        "reward": reward,
        "visual": visual,
        "text": pieces(text, spans),
        "places": [[round(number, 2) for number in place] for place in places],
        "notes": [f"{name}: {_text(part)}" for name, part in notes.items()],
        "tools": [
            [index, *size]
            for index, size in (pictures.add(image, row.file.parent) for image in values.get("tool_images") or [])
        ],
    }


def _check(row: Row) -> None:
    for name, kind in (("output", str), ("score", Real), ("step", int)):
        got = row.values.get(name)
        if not isinstance(got, kind):
            raise ValueError(
                f"a rollout has a {name}, as verl's trainer.rollout_data_dir writes it; got {got!r} in {row.where}. "
                "Name that folder, and nothing else."
            )


def collect(rows: Iterable[Row], coordinates: str, side: int) -> dict[str, Any]:
    """The content of the page: `rollouts` ordered by step, prompt and rollout, `prompts` and `images` they refer to by
    index, and the names of all numbers.

    Raises:
        ValueError: a row that is no rollout, or an image that is missing or cannot be read; the message names the row.
    """
    pictures = Pictures(side)
    prompts: dict[tuple, int] = {}
    described: list[dict[str, Any]] = []
    rollouts = []
    for row in rows:
        _check(row)
        uid = str(row.values.get("uid", row.number)).rsplit("_", 2)
        key = (row.values["step"], str(row.file), uid[0])
        if key not in prompts:
            prompts[key] = len(described)
            with naming(row.where):
                described.append(_prompt(row, pictures))
        number = prompts[key]
        with naming(row.where):
            own = _rollout(row, described[number], coordinates, pictures)
        rollouts.append({"step": row.values["step"], "prompt": number, **own})
    rollouts.sort(key=lambda rollout: (rollout["step"], rollout["prompt"]))
    return {
        "rollouts": rollouts,
        "prompts": described,
        "images": pictures.uris,
        # Of the reward first, in the order in which they come up.
        "reward": list(dict.fromkeys(name for rollout in rollouts for name in (REWARD, ADVANTAGE, *rollout["reward"]))),
        "visual": list(dict.fromkeys(name for rollout in rollouts for name in rollout["visual"])),
    }


def script_json(value: Any) -> Markup:
    """JSON for a script element: no text in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def write_page(options: Show) -> str:
    """Write the page; one line about it.

    Raises:
        ValueError: anything that `read_rows` or `collect` refuses, or no rollout of the wanted steps.
    """
    rows = progress(read_rows(options.data), "read", unit="rollout", leave=False)
    if options.steps is not None:
        rows = (row for row in rows if row.values.get("step") in options.steps)
    content = collect(rows, options.coordinates, options.side)
    if not content["rollouts"]:
        raise ValueError(f"a page has rollouts; got none of the steps {options.steps} in {options.data}. Name others.")
    folder = options.data if options.data.is_dir() else options.data.parent
    out = options.out if options.out is not None else folder / "rollouts.html"
    steps = sorted({rollout["step"] for rollout in content["rollouts"]})
    out.parent.mkdir(parents=True, exist_ok=True)
    text = page(
        "rollouts/page.html.j2",
        name=options.data.resolve().name,
        steps=steps,
        sources=sorted({prompt["source"] for prompt in content["prompts"]} - {""}),
        content=script_json(content),
        num=len(content["rollouts"]),
        num_prompts=len(content["prompts"]),
        num_images=len(content["images"]),
        names=content["reward"] + content["visual"],
    )
    out.write_text(text, encoding="utf-8")
    return f"{len(content['rollouts'])} rollouts of {len(steps)} steps, {len(content['images'])} images: {out}"
