# SPDX-License-Identifier: Apache-2.0
"""Conversations with known texts, and images for them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

SYSTEM_TEXT = "Answer in one short sentence."


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse random colours, which survive resizing."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def user(text: str, images: Sequence[Image.Image] = ()) -> dict:
    blocks = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": text}]}


def system(text: str = SYSTEM_TEXT) -> dict:
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def conversations() -> dict[str, list[dict]]:
    """Every shape of a training row. No text is part of another one."""
    wide, tall, square = picture(160, 96, 1), picture(96, 160, 2), picture(112, 112, 3)
    return {
        "one image": [
            system(),
            user("Which colour is on the left side?", [wide]),
            assistant("Most of the left side is dark green."),
        ],
        "two images of different shapes": [
            system(),
            user("Do these two look alike?", [tall, wide]),
            assistant("No, one of them stands upright."),
        ],
        "two turns": [
            system(),
            user("What can be seen here?", [square]),
            assistant("A pattern of squares."),
            user("And what about this second one?", [tall]),
            assistant("The same thing, only narrower."),
        ],
        "text only": [
            system(),
            user("How many legs does a spider have?"),
            assistant("It has eight."),
        ],
    }
