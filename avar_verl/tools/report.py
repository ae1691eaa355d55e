# SPDX-License-Identifier: Apache-2.0
"""The HTML reports of all tools: one page base (`base.html.j2`), numbers as text, pictures with attention on them.

Shape suffixes: Y, X = cells of a map over an image, C = color channels
"""

import base64
import binascii
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

UNDERFLOW = "inf (a head's system mass underflowed)"
UNDEFINED = "not defined"
HEAT_RGB = (213, 94, 0)  # Vermilion of Okabe and Ito's palette.
HEAT_OPACITY = 0.72


# ---- templates ---------------------------------------------------------------------------------------------------


def environment(html: bool = True) -> Environment:
    """jinja2 as every template of the tools is written for; `html`: what is filled in is escaped.

    Templates are found by their path in this folder, such as `vas/report.html.j2`.
    """
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(template: str, **values: Any) -> str:
    """An HTML page that needs no other file, from a template that extends `base.html.j2`."""
    return environment().get_template(template).render(values)


# ---- words -----------------------------------------------------------------------------------------------------


def number_text(value: float, digits: int = 2) -> str:
    """A number of any size for a table, in at most about eight characters; inf and nan in words."""
    if math.isnan(value):
        return UNDEFINED
    if math.isinf(value):
        return UNDERFLOW if value > 0 else "-inf"
    if value != 0 and abs(value) < 10.0**-digits or abs(value) >= 1e7:
        return f"{value:.1e}"
    return f"{value:,.{0 if abs(value) >= 1000 else digits}f}"


def duration_text(seconds: float) -> str:
    """Seconds as `45 s` or `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates replaced, which HTML or UTF-8 do not allow."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def numbers(values: Any) -> np.ndarray:
    """Values of a JSON file as float64; "inf" and "nan" are numbers, None is nan."""
    array = np.array(values, dtype=object)
    array[array == None] = math.nan  # noqa: E711  Elementwise.
    return array.astype(np.float64)


# ---- pictures --------------------------------------------------------------------------------------------------


def decode_image(encoded: str, where: str) -> Image.Image:
    """A base64 image as RGB.

    Raises:
        ValueError: not base64, or not an image.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
            return image.convert("RGB")
    except (binascii.Error, UnidentifiedImageError) as error:
        raise ValueError(
            f"image of {where} must be a base64 image file; got {encoded[:20]!r}. Delete the file that has it, "
            "and measure again."
        ) from error


def overlay(image: Image.Image, attention_YX: Sequence[Sequence[float]]) -> Image.Image:
    """The image in grey with attention as orange, from 0 (clear) to the map's own maximum (opaque)."""
    values_YX = np.array(attention_YX, dtype=np.float32)
    peak = float(values_YX.max())
    smooth = Image.fromarray(values_YX / peak if peak else values_YX).resize(image.size, Image.BICUBIC)
    alpha_YX1 = HEAT_OPACITY * np.clip(np.asarray(smooth), 0, 1)[..., None]
    grey_YXC = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    mixed_YXC = (1 - alpha_YX1) * grey_YXC + alpha_YX1 * np.array(HEAT_RGB, dtype=np.float32)
    return Image.fromarray(mixed_YXC.round().astype(np.uint8))


def encode_image(image: Image.Image) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def data_uri(image: Image.Image) -> str:
    """A PNG as a data URI."""
    return f"data:image/png;base64,{encode_image(image)}"


def thumbnail_uri(image: Image.Image, side: int, lossless: bool) -> str:
    """An RGB image of at most `side` pixels a side as a data URI: a PNG, or a JPEG unless `lossless`."""
    small = image.copy()
    small.thumbnail((side, side))
    if lossless:
        return data_uri(small)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
