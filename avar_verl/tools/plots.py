# SPDX-License-Identifier: Apache-2.0
"""What the HTML reports share: numbers as text, figures as inline SVG, pictures with attention on them.

Shape suffixes: L = layers, H = query heads, Y, X = cells of a map over an image, C = color channels
"""

import base64
import binascii
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, UnidentifiedImageError

UNDERFLOW = "inf (a head's system mass underflowed)"
UNDEFINED = "not defined"
HEAT_RGB = (213, 94, 0)  # Vermilion of Okabe and Ito's palette.
HEAT_OPACITY = 0.72
FEW = 64  # Cells of a heat map that are small enough a number to be written into each.


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


# ---- figures ---------------------------------------------------------------------------------------------------

RC = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
}


def svg(figure: Figure, name: str, alt: str) -> Markup:
    """A figure as inline SVG. `name` is unique in the page: SVG ids are global there."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={key: None for key in ("Creator", "Date", "Format", "Type")})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # Nothing refers to groups, and every figure has the same ones.
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))


def legend_above(axes: Axes, number: int) -> None:
    """A legend over the axes, where there is more than one curve."""
    if number > 1:
        columns = number if number < 4 else 2
        axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 0.98), ncols=columns, borderaxespad=0, columnspacing=1.2)


def heat_figure(name: str, what: str, maps: Mapping[str, tuple[Any, Any]], layers: Sequence[int]) -> Markup:
    """Layer by head: image share above, log10 of the mean ratio image / system below, one scale a row.

    Args:
        what: whose attention it is, for those who do not see it.
        maps: column title -> (share_LH, ratio_LH).
        layers: numbers of the layers.
    """
    shares = [numbers(share) for share, _ in maps.values()]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [np.log10(numbers(ratio)) for _, ratio in maps.values()]
    finite = np.concatenate([log_LH[np.isfinite(log_LH)] for log_LH in logs])
    bound = max(1.0, float(np.abs(finite).max(initial=0.0)))
    rows = (("image share", shares, "viridis", 0.0, 1.0), ("log10(image / system)", logs, "PuOr_r", -bound, bound))
    with matplotlib.rc_context({**RC, "axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(10.5, 4.9))
        place = {"left": 0.05, "right": 0.95, "bottom": 0.09, "top": 0.94, "wspace": 0.06, "hspace": 0.07}
        grid = figure.subplots(2, len(maps), sharex=True, sharey=True, squeeze=False, gridspec_kw=place)
        for axes_row, (label, values, colors, low, high) in zip(grid, rows, strict=True):
            for axes, values_LH in zip(axes_row, values, strict=True):
                image = _draw_cells(axes, values_LH, colors, low, high, layers)
            figure.colorbar(image, ax=list(axes_row), label=label, pad=0.012, fraction=0.03)
            axes_row[0].set_ylabel("layer")
        for axes, title in zip(grid[0], maps, strict=True):
            axes.set_title(title)
        for axes in grid[-1]:
            axes.set_xlabel("head")
        alt = ", ".join(f"{title} {number_text(np.mean(share))}" for title, share in zip(maps, shares, strict=True))
        return svg(figure, name, f"{what} by layer and head; mean image share: {alt}.")


def _draw_cells(axes, values_LH: np.ndarray, colors: str, low: float, high: float, layers: Sequence[int]):
    """One map. A small one has its numbers in the cells, and a cell that is not finite always has its word."""
    colormap = matplotlib.colormaps[colors].with_extremes(bad="#ffffff")
    shown_LH = np.where(np.isinf(values_LH), np.sign(values_LH) * high, values_LH)
    image = axes.imshow(shown_LH, cmap=colormap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    num_layers, num_heads = values_LH.shape
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.xaxis.set_view_interval(-0.5, num_heads - 0.5)
    step = max(1, math.ceil(num_layers / 10))
    axes.set_yticks(range(0, num_layers, step), [str(layers[index]) for index in range(0, num_layers, step)])
    for (layer, head), value in np.ndenumerate(values_LH):
        if values_LH.size > FEW and math.isfinite(value):
            continue
        text = f"{value:.2f}" if low == 0 else f"{round(value, 1) + 0.0:.1f}"  # + 0.0: no minus zero.
        text = text if math.isfinite(value) else "n/a" if math.isnan(value) else "inf" if value > 0 else "-inf"
        red, green, blue, _ = colormap(image.norm(shown_LH[layer, head])) if not math.isnan(value) else (1, 1, 1, 1)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(head, layer, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return image


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


def data_uri(image: Image.Image) -> str:
    """A PNG as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
