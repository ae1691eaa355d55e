# SPDX-License-Identifier: Apache-2.0
"""Images that programs open in different ways, as a row holds them."""

import io

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 120, 88


def _encoded(image: Image.Image, form: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def _photo(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def _turned(orientation: int) -> dict:
    exif = Image.Exif()
    exif[274] = orientation
    return {"bytes": _encoded(_photo(0), exif=exif)}


def _half_transparent() -> Image.Image:
    image = _photo(1).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _palette() -> bytes:
    image = _photo(2).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    return _encoded(image, transparency=image.getpixel((60, 20)))


def _deep() -> bytes:
    return _encoded(Image.fromarray(np.asarray(_photo(3).convert("L")).astype(np.uint16) * 2))


def _moving() -> bytes:
    return _encoded(_photo(4), "GIF", save_all=True, append_images=[_photo(5)])


ODD_IMAGES = {
    **{f"EXIF {orientation}": _turned(orientation) for orientation in range(1, 9)},
    "palette": {"bytes": _palette()},
    "LA": {"bytes": _encoded(_half_transparent().convert("LA"))},
    "RGBA": {"bytes": _encoded(_half_transparent())},
    "CMYK": {"bytes": _encoded(_photo(6).convert("CMYK"), "JPEG")},
    "16 bit": {"bytes": _deep()},
    "GIF": {"bytes": _moving()},
    "max_pixels": {"bytes": _encoded(_photo(7)), "max_pixels": 28 * 28 * 6},
    "min_pixels": {"bytes": _encoded(_photo(8).resize((28, 28))), "min_pixels": 28 * 28 * 9},
}
