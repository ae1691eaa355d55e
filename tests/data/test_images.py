# SPDX-License-Identifier: Apache-2.0
"""Every layout of an image in a row, the pixels against those of verl's own function, and what is refused."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from avar_verl.data import images
from avar_verl.data.images import as_verl_image, layout_problem, load_image, open_image, pixel_notes
from avar_verl.tools.demo.photo_grid import load_photo


@pytest.fixture(scope="module")
def cat():
    return load_photo("chelsea.png").resize((112, 56))


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cat):
    folder = tmp_path_factory.mktemp("images")
    (folder / "cat.png").write_bytes(encoded(cat))
    return folder


def uri(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


LAYOUTS = {
    "pil": lambda path, data, image: image,
    "bytes": lambda path, data, image: data,
    "bytearray": lambda path, data, image: bytearray(data),
    "path": lambda path, data, image: path,
    "str": lambda path, data, image: str(path),
    "file": lambda path, data, image: f"file://{path}",
    "data": lambda path, data, image: uri(data),
    "datasets": lambda path, data, image: {"bytes": data, "path": None},
    "datasets_path": lambda path, data, image: {"bytes": None, "path": str(path)},
    "image_path": lambda path, data, image: {"image": str(path)},
    "image_pil": lambda path, data, image: {"image": image, "min_pixels": 3136},
    "image_data": lambda path, data, image: {"image": uri(data)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_opens_to_the_same_pixels(layout, folder, cat):
    path = folder / "cat.png"
    value = LAYOUTS[layout](path, path.read_bytes(), cat)
    opened = open_image(value)
    assert opened.mode == "RGB" and np.array_equal(opened, cat)
    again = as_verl_image(value, embed=True)
    assert np.array_equal(open_image(again), cat)
    assert again.get("min_pixels") == (3136 if layout == "image_pil" else None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_as_verl_image_writes_verl_opens(layout, folder, cat):
    from verl.utils.dataset.vision_utils import process_image

    path = folder / "cat.png"
    value = as_verl_image(LAYOUTS[layout](path, path.read_bytes(), cat))
    assert layout_problem(value, "sft") is None and layout_problem(value, "rl") is None
    assert np.array_equal(process_image(value), cat)  # 112 x 56: nothing is resized.


def test_layout_problem_is_what_verl_fails_on(folder):
    from verl.utils.dataset.vision_utils import process_image

    data = (folder / "cat.png").read_bytes()
    values = [
        {"bytes": None, "path": str(folder / "cat.png")},
        {"bytes": data, "image": str(folder / "cat.png")},
        {"path": str(folder / "cat.png")},
        str(folder / "cat.png"),
        data,
    ]
    for value in values:
        open_image(value)
        assert layout_problem(value, "sft"), value
        with pytest.raises((OSError, AssertionError, KeyError, TypeError, AttributeError)):
            process_image(dict(value) if isinstance(value, dict) else value)
    assert [layout_problem(value, "rl") is not None for value in values] == [True, False, True, False, True]


def test_relative_paths_start_from_the_root(folder, monkeypatch):
    assert open_image("cat.png", root=folder).size == (112, 56)
    assert as_verl_image("cat.png", root=folder) == {"image": str(folder / "cat.png")}
    monkeypatch.chdir(folder.parent)
    assert open_image(f"{folder.name}/cat.png").size == (112, 56)
    with pytest.raises(ValueError, match=f"an image file must exist; got '{folder}/dog.png'.*start from '{folder}'"):
        open_image("dog.png", root=folder)
    with pytest.raises(ValueError, match="an image file must be readable; got .*dog.png.*No such file"):
        as_verl_image("dog.png", embed=True, root=folder)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16"])
def test_pixels_are_those_that_verl_sees(mode, cat):
    from verl.utils.dataset.vision_utils import process_image

    image = cat.convert("L" if mode == "I;16" else mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert("I").convert("I;16") if mode == "I;16" else image
    data = encoded(image, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    assert np.array_equal(open_image(data), process_image({"bytes": data}))
    assert np.array_equal(open_image(image), process_image(image))


def test_notes_on_pixels_that_a_viewer_shows_otherwise(cat):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = encoded(cat, "JPEG", exif=exif)
    assert open_image(turned).size == (112, 56)  # Not turned.
    see_through = cat.convert("RGBA")
    see_through.putalpha(0)
    deep = Image.fromarray(np.full((56, 56), 40000, np.uint16))
    dog = load_photo("coffee.png").resize((112, 56))
    notes = {
        turned: ["EXIF orientation 6, which is not applied"],
        encoded(see_through): ["transparent pixels, which become white"],
        encoded(see_through.convert("LA")): ["transparent pixels, which become opaque"],
        encoded(deep): ["mode I;16, whose values above 255 all become white"],
        encoded(cat, "GIF", save_all=True, append_images=[dog]): ["2 frames, of which the first counts"],
        encoded(cat.convert("RGBA")): [],
        encoded(cat): [],
    }
    assert {data: pixel_notes(load_image(data)) for data in notes} == notes


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_refused_whatever_the_damage(cat):
    rng = np.random.default_rng(0)
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        data = encoded(cat, kind)
        for cut in rng.integers(1, len(data), 20):
            damaged = bytearray(data)
            damaged[rng.integers(0, min(200, len(data)))] = 0xFF
            for value in (data[:cut], bytes(damaged)):
                try:
                    open_image(value)
                except ValueError as error:
                    assert str(error).startswith("an image must be"), error
                    refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "value, message",
    [
        (b"", "an image must have bytes; got none"),
        (b"not an image", "an image must be in a format that Pillow reads; got 12 bytes that start with b'not an i'"),
        ({}, r"an image dict must have one of the keys \['bytes', 'image', 'path'\] with a value; got {}"),
        ({"bytes": None, "path": None}, "an image dict must have one of the keys"),
        (3, "an image must be PIL, bytes, a path or a dict of one of them; got int"),
        ({"image": ["a.png"]}, "an image must be PIL, bytes, a path or a dict of one of them; got list"),
        ("", "an image must be readable as a whole; got '.'"),
        ("/nowhere/cat.png", "an image file must exist; got '/nowhere/cat.png'"),
        ("data:image/png,abc", "a data URI must be data:image/...;base64"),
        ("data:image/png;base64,a", "a data URI must hold base64"),
        ("https://example.org/cat.png", "images must be on this machine; got the URL 'https://example.org/cat.png'"),
        ("s3://bucket/cat.png", "images must be on this machine; got the URL 's3://bucket/cat.png'"),
        (Image.new("RGB", (0, 5)), r"an image must have pixels; got a PIL image of mode RGB of size \(0, 5\)"),
        (Image.new("La", (2, 2)), "an image must convert to RGB; got mode La"),
    ],
)
def test_what_is_no_image_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        open_image(value)


def test_truncated_and_huge_files_are_refused(cat, monkeypatch):
    with pytest.raises(ValueError, match="an image must be readable as a whole; got .* bytes .*truncated"):
        open_image(encoded(cat, "JPEG")[:-500])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="an image must be within Pillow.s limit of pixels; got .*6272 pixels"):
        open_image(encoded(cat))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # Pillow warns, verl opens it, and so does this.
    open_image(encoded(cat))


class FakeResponse:
    def __init__(self, chunks, status=None):
        self.chunks, self.status = chunks, status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def raise_for_status(self):
        if self.status:
            raise self.status

    def iter_content(self, _):
        yield from self.chunks


def test_urls_are_fetched_when_allowed(cat, monkeypatch):
    import requests

    asked = []

    def get(url, timeout, stream):
        asked.append((url, timeout, stream))
        return FakeResponse([encoded(cat)[:100], encoded(cat)[100:]])

    monkeypatch.setattr(requests, "get", get)
    url = "https://example.org/cat.png"
    assert np.array_equal(open_image({"image": url}, allow_urls=True), cat)
    assert asked == [(url, images.URL_TIMEOUT_S, True)]
    monkeypatch.setattr(images, "URL_TIMEOUT_S", -1.0)
    with pytest.raises(ValueError, match="an image URL must answer; got 'https://.*not whole after"):
        open_image(url, allow_urls=True)
    monkeypatch.setattr(requests, "get", lambda *_, **__: FakeResponse([], requests.HTTPError("404")))
    with pytest.raises(ValueError, match="an image URL must answer; got 'https://example.org/cat.png': 404"):
        open_image(url, allow_urls=True)
    with pytest.raises(ValueError, match="an image URL must be http or https; got 's3://bucket/cat.png'"):
        open_image("s3://bucket/cat.png", allow_urls=True)
    assert as_verl_image(url, embed=True) == {"image": url}  # Nothing is fetched on the way.


def test_a_path_like_object_is_kept_out_of_the_written_row(folder):
    assert as_verl_image(Path("cat.png"), root=folder) == {"image": str(folder / "cat.png")}
