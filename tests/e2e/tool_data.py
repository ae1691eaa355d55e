# SPDX-License-Identifier: Apache-2.0
"""Questions about one place of the photo grid, whose answer zooms into the place and then names what is there."""

import io
import json
from pathlib import Path

import pandas as pd
from PIL import Image

from avar_verl.tools.demo import photo_grid

TOOL = "image_zoom_in"


def call(box) -> str:
    """As Qwen's models write it, and verl's parser `hermes` reads it."""
    return f"<tool_call>\n{json.dumps({'name': TOOL, 'arguments': {'bbox_2d': list(box)}})}\n</tool_call>"


def samples(n: int, seed: int = 0) -> list[photo_grid.Sample]:
    return [sample for sample in photo_grid.make_samples(2 * n, seed, "train") if sample.kind == "what"][:n]


def box_of(sample: photo_grid.Sample):
    return next(box for place, box in photo_grid.PLACES.items() if place in sample.question)


def png(image: Image.Image) -> dict[str, bytes]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}


def make_sft(path: Path, n: int, seed: int = 0) -> Path:
    """Rows of the cold start: question, call, the tool's turn with the zoomed image, answer."""
    rows = []
    for sample in samples(n, seed):
        box = box_of(sample)
        turns = [
            ("user", f"<image>{sample.question}"),
            ("assistant", call(box)),
            ("tool", "<image>"),
            ("assistant", f"<answer>{sample.answer}</answer>"),
        ]
        rows.append(
            {
                "messages": [{"role": role, "content": content} for role, content in turns],
                "images": [png(sample.image), png(sample.image.crop(box))],
            }
        )
    pd.DataFrame(rows).to_parquet(path)
    return path


def make_rl(path: Path, n: int, seed: int = 1) -> Path:
    photo_grid.write_rl(path, samples(n, seed))
    return path
