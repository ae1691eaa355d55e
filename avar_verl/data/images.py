# SPDX-License-Identifier: Apache-2.0
"""Images of a data set: opens every layout that rows use, as the trainers do, or raises an error that says why not.

Pixels are those that verl 0.9.1 passes to the processor: the EXIF orientation is not applied, transparency is put on
white (`qwen_vl_utils.fetch_image`) or, for a bare PIL image, dropped (verl's `process_image`). `pixel_notes` lists what
a viewer would show differently. No verl, no torch.
"""

import base64
import binascii
import hashlib
import io
import os
import re
import struct
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

URL_TIMEOUT_S = 30.0
# Exceptions of Pillow's decoders for a file that only starts like an image.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
)
# A dict of a row has its image under the first of these keys that is not None.
KEYS = ("bytes", "image", "path")
# How the formats begin, in base64.
BASE64 = {
    "iVBORw0KGgo": "png",
    "/9j/": "jpeg",
    "R0lGOD": "gif",
    "UklGR": "webp",
    "Qk": "bmp",
    "SUkq": "tiff",
    "TU0A": "tiff",
}
SHORTEST_BASE64 = 40  # Characters of an image, which needs some thirty bytes.
LONGEST_SHOWN = 200


def _cut(text: str) -> str:
    """A text for an error message, without its middle if it is long."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:60]} ... {text[-30:]} ({len(text)} characters)"


def check_not_base64(held: str | bytes) -> None:
    """Refuse base64 where a path or the bytes of a file are wanted.

    Raises:
        ValueError: it looks like base64 of an image; the message says what to write instead.
    """
    start = (held[:4096].decode("ascii", "replace") if isinstance(held, bytes) else held[:4096]).strip()
    got = f"an image must be the bytes of a file, a path or a data URI; got {len(held)} characters that look like"
    if start.startswith("data:image"):  # In bytes; as text it is a data URI.
        raise ValueError(f"{got} a data URI ({start[:24]!r}). Write it as text.")
    kind = next((kind for magic, kind in BASE64.items() if start.startswith(magic)), None)
    if len(start) < (SHORTEST_BASE64 if kind else 1024) or re.fullmatch(r"[A-Za-z0-9+/_=\s-]+", start) is None:
        return
    of = f" of a {kind.upper()} file" if kind else ""
    raise ValueError(
        f"{got} base64{of} ({start[:24]!r}). Put 'data:image/{kind or 'png'};base64,' before it, or decode it into "
        "bytes."
    )


def _held(value: Any) -> Any:
    """The image in a row's value: PIL, bytes or text."""
    if isinstance(value, Mapping):
        held = [value[key] for key in KEYS if value.get(key) is not None]
        if not held:
            raise ValueError(
                f"an image dict must have one of the keys {list(KEYS)} with a value; got {_cut(str(dict(value)))}. "
                'Write {"bytes": ...} or {"image": path}.'
            )
        value = held[0]
    if isinstance(value, Image.Image | bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    raise ValueError(
        f"an image must be PIL, bytes, a path or a dict of one of them; got {type(value).__name__}. Write "
        '{"bytes": ...} or {"image": path}.'
    )


def _scheme(text: str) -> str:
    """`data`, `file`, `https` ... of a URI; "" of a path."""
    match = re.match(r"(data):|([A-Za-z][A-Za-z0-9+.-]*)://", text)
    return (match[1] or match[2]).lower() if match else ""


def _local_path(text: str, root: str | os.PathLike | None) -> Path:
    """The file of a path or file:// URI. No percent-decoding: `qwen_vl_utils.fetch_image` does none."""
    path = Path(text[7:] if _scheme(text) == "file" else text)
    path = Path(root, path) if root is not None else path
    if not os.path.exists(path):  # Not `Path.exists`, to which a name may be too long.
        check_not_base64(text)
    return path


def _data_uri(text: str) -> bytes:
    header, _, payload = text.partition(",")
    if not header.endswith(";base64"):
        raise ValueError(f"a data URI must be data:image/...;base64,...; got {text[:40]!r}. Encode it in base64.")
    try:
        return base64.b64decode(payload)
    except binascii.Error as error:
        raise ValueError(f"a data URI must hold base64; got {text[:40]!r}: {error}. Encode the file again.") from error


def _download(url: str) -> bytes:
    import requests

    if _scheme(url) not in ("http", "https"):
        raise ValueError(
            f"an image URL must be http or https; got {_cut(url)!r}. Download the file first and give its path."
        )
    deadline = time.monotonic() + URL_TIMEOUT_S
    chunks = []
    try:
        # The timeout of requests is between two packets, so a slow server also needs a deadline.
        with requests.get(url, timeout=URL_TIMEOUT_S, stream=True) as response:
            response.raise_for_status()
            for chunk in response.iter_content(1 << 16):
                chunks.append(chunk)
                if time.monotonic() > deadline:
                    raise requests.Timeout(f"not whole after {URL_TIMEOUT_S:.0f} s")
    except requests.RequestException as error:
        raise ValueError(f"an image URL must answer; got {_cut(url)!r}: {error}. Download the file first.") from error
    return b"".join(chunks)


def _name(held: Any, root: str | os.PathLike | None) -> str:
    """Description of the image for error messages."""
    if isinstance(held, Image.Image):
        return f"a PIL image of mode {held.mode}"
    if isinstance(held, bytes):
        return f"{len(held)} bytes that start with {held[:8]!r}"
    if _scheme(held) == "data":
        return f"the data URI {held[:40]!r}"
    return repr(_cut(held if _scheme(held) in ("http", "https") else str(_local_path(held, root))))


def load_image(value: Any, *, allow_urls: bool = False, root: str | os.PathLike | None = None) -> Image.Image:
    """The decoded image of a row's value, in the mode it is stored in; for the arguments see `open_image`."""
    held = _held(value)
    name = _name(held, root)
    source: Any = held
    if isinstance(held, str):
        scheme = _scheme(held)
        if scheme == "data":
            source = _data_uri(held)
        elif scheme in ("", "file"):
            source = _local_path(held, root)
        elif allow_urls:
            source = _download(held)
        else:
            raise ValueError(
                f"images must be on this machine; got the URL {_cut(held)!r}. Download it, or allow URLs "
                "(allow_urls=True, --allow-urls), which makes the training wait for a server."
            )
    if isinstance(source, bytes):
        if not source:
            raise ValueError("an image must have bytes; got none. Write the file's content, or leave the row out.")
        source = io.BytesIO(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # verl opens them.
            image = source if isinstance(source, Image.Image) else Image.open(source)
            image.load()
    except FileNotFoundError as error:
        start = Path.cwd() if root is None else Path(root)
        raise ValueError(
            f"an image file must exist; got {name}. Check the path; relative ones start from {str(start)!r}."
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"an image must be within Pillow's limit of pixels; got {name}: {error}. Shrink it."
        ) from error
    except UnidentifiedImageError as error:
        if isinstance(held, bytes):
            check_not_base64(held)
        raise ValueError(
            f"an image must be in a format that Pillow reads; got {name}. Convert it to PNG or JPEG, or leave the row "
            "out."
        ) from error
    except DECODING_ERRORS as error:
        raise ValueError(
            f"an image must be readable as a whole; got {name}: {_cut(str(error))}. Write the file anew, or leave "
            "the row out."
        ) from error
    if min(image.size) < 1:
        raise ValueError(f"an image must have pixels; got {name} of size {image.size}. Leave the row out.")
    return image


def to_rgb(image: Image.Image, *, bare: bool = False) -> Image.Image:
    """The three channels that the trainer sees; `bare` for a PIL image that is in a row without a dict.

    Raises:
        ValueError: a mode that Pillow cannot convert.
    """
    if image.mode == "RGBA" and not bare:  # As `qwen_vl_utils.to_rgb`; other modes lose their transparency there too.
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"an image must convert to RGB; got mode {image.mode}. Save it as RGB.") from error


def open_image(value: Any, *, allow_urls: bool = False, root: str | os.PathLike | None = None) -> Image.Image:
    """The RGB image of a row's value, at its stored size.

    Args:
        value: PIL, bytes, a path, a file:// or data: URI, or a dict that has one of these under `bytes` (as written by
            datasets, together with `path`), `image` or `path`.
        allow_urls: fetch http(s) URLs, each within `URL_TIMEOUT_S` seconds.
        root: folder for relative paths (default: the working folder, as in verl).

    Raises:
        ValueError: an unknown type, a missing file, a URL without `allow_urls`, bytes that are not an image or only
            part of one, no pixels, or more pixels than Pillow opens; the message names the image.
    """
    return to_rgb(load_image(value, allow_urls=allow_urls, root=root), bare=isinstance(value, Image.Image))


def as_verl_image(value: Any, *, embed: bool = False, root: str | os.PathLike | None = None) -> dict[str, Any]:
    """The same image as a dict that both of verl's data sets open: `{"bytes": ...}`, or `{"image": ...}` with an
    absolute path, a URI or PIL. Other keys of a dict, such as `min_pixels`, are kept. The image is not opened.

    Args:
        embed: put the content of a file into the dict, unchanged.
        root: as in `open_image`.

    Raises:
        ValueError: no image, or (with `embed`) a missing file.
    """
    rest = {key: item for key, item in value.items() if key not in KEYS} if isinstance(value, Mapping) else {}
    held = _held(value)
    if isinstance(held, str) and _scheme(held) in ("", "file"):
        path = _local_path(held, root).absolute()
        if not embed:
            return {**rest, "image": str(path)}
        try:
            held = path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"an image file must be readable; got {_cut(str(path))!r}: {error.strerror}. Check the path and "
                "the folder that relative paths start from."
            ) from error
    elif isinstance(held, str) and _scheme(held) == "data" and embed:
        held = _data_uri(held)
    return {**rest, "bytes" if isinstance(held, bytes) else "image": held}


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet. Several processes may write it; a reader sees all of it or nothing."""
    if not path.exists():
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_bytes(content)
        part.replace(path)


def image_file(value: Any, *, root: str | os.PathLike | None = None) -> tuple[str, bytes]:
    """(name, content) of a file with the image of a row's value. The name is `<sha256 of the content>.<format>`, cut to
    32 digits, so that equal images get one file.

    The content is unchanged where the row has or names a file; a PIL image becomes a PNG.

    Args:
        value, root: as in `open_image`; no URL but file: and data:.

    Raises:
        ValueError: a URL, a missing file, or content that is no image.
    """
    held = as_verl_image(value, embed=True, root=root)
    image = load_image(held)
    content = held.get("bytes")
    if content is None:
        buffer = io.BytesIO()
        to_rgb(image, bare=isinstance(value, Image.Image)).save(buffer, "PNG")
        content, kind = buffer.getvalue(), "png"
    else:
        kind = (image.format or "").lower()
    return f"{hashlib.sha256(content).hexdigest()[:32]}.{kind}", content


def layout_problem(value: Any, kind: str) -> str | None:
    """Why verl's own data set of a kind fails on a value that `open_image` can open; None if it does not fail.

    kind: "sft" (`MultiTurnSFTDataset`, which calls `process_image`) or "rl" (`RLHFDataset._build_messages`).
    """
    if isinstance(value, Mapping):
        if "bytes" in value and value["bytes"] is None:  # verl only checks for the key.
            return "a dict whose `bytes` is null"
        if isinstance(value.get("bytes"), str):
            return "a dict whose `bytes` is text"
        if "bytes" in value and "image" in value and kind == "sft":
            return "a dict with both `bytes` and `image`"
        if "bytes" not in value and value.get("image") is None:
            return "a dict with neither `bytes` nor `image`"
        return None
    if isinstance(value, str) and kind == "sft":
        return "a path without a dict"
    return "bytes without a dict" if isinstance(value, bytes) else None


def pixel_notes(image: Image.Image) -> list[str]:
    """What a viewer shows differently than the trainer sees, one phrase each; `image` is from `load_image`."""
    notes = []
    try:
        orientation, frames = image.getexif().get(ExifTags.Base.Orientation, 1), getattr(image, "n_frames", 1)
    except DECODING_ERRORS:  # The pixels of the first frame are valid anyway.
        orientation, frames = 1, 1
        notes.append("broken data in addition to its pixels")
    if orientation != 1:
        notes.append(f"EXIF orientation {orientation}, which is not applied")
    if frames > 1:
        notes.append(f"{frames} frames, of which the first counts")
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if has_alpha and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:  # pyright: ignore[reportOperatorIssue]
        notes.append(f"transparent pixels, which become {'white' if image.mode == 'RGBA' else 'opaque'}")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        notes.append(f"mode {image.mode}, whose values above 255 all become white")
    return notes
