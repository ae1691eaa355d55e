# SPDX-License-Identifier: Apache-2.0
import base64
import io
import re

import pytest
from PIL import Image

from avar_verl.tools.synth.config import InputConfig
from avar_verl.tools.synth.items import Item, difference_hash, make_item, make_picture, pack, text_hash, unpack


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def gradient():
    return Image.linear_gradient("L").resize((64, 48)).transpose(Image.ROTATE_90).convert("RGB")


CONFIG = InputConfig(files=["x.parquet"], boxes="boxes")


def row(gradient, **changes):
    values = {
        "question": "How wide?",
        "answer": "4",
        "images": [{"bytes": encoded(gradient)}],
        "boxes": [[[0, 0, 8, 8]]],
    }
    return {**values, **changes}


def test_difference_hash_by_hand():
    # Nine columns, eight rows; only in the first row does it get brighter to the right: bits 0 to 7.
    image = Image.new("L", (9, 8), 50)
    for x in range(9):
        image.putpixel((x, 0), 10 * x)
    assert difference_hash(image) == 0b11111111


def test_a_picture_is_recognised_after_scaling_and_encoding(gradient):
    own, other = make_picture(encoded(gradient)), make_picture(encoded(gradient.resize((128, 96)), "JPEG"))
    assert own.pixels != other.pixels and (own.dhash ^ other.dhash).bit_count() <= 4
    flipped = make_picture(gradient.transpose(Image.FLIP_LEFT_RIGHT))
    assert (own.dhash ^ flipped.dhash).bit_count() > 4


def test_own_bytes_are_kept_where_an_endpoint_reads_them(gradient):
    for kind, mime in (("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")):
        data = encoded(gradient, kind)
        assert (make_picture({"bytes": data}).data, make_picture({"bytes": data}).mime) == (data, mime)


@pytest.mark.parametrize("kind", ["BMP", "GIF"])
def test_others_become_png(gradient, kind):
    picture = make_picture(encoded(gradient, kind))
    assert picture.mime == "image/png" and picture.data.startswith(b"\x89PNG")


def test_transparency_becomes_white_as_for_the_trainer(gradient):
    image = gradient.convert("RGBA")
    image.putalpha(0)
    picture = make_picture(encoded(image))
    assert Image.open(io.BytesIO(picture.data)).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_paths_and_data_uris(gradient, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(gradient))
    by_path = make_picture("a.png", root=str(tmp_path))
    by_uri = make_picture("data:image/png;base64," + base64.b64encode(encoded(gradient)).decode())
    assert by_path.pixels == by_uri.pixels == make_picture(gradient).pixels


def test_own_bytes_of_files_and_data_uris_are_kept_too(gradient, tmp_path):
    data = encoded(gradient, "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    uri = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    for value in ({"path": "a.jpg", "bytes": None}, f"file://{tmp_path}/a.jpg", uri, {"image": uri}):
        assert make_picture(value, root=str(tmp_path)).data == data


def test_text_hash_is_of_the_words():
    assert text_hash("<image>How  WIDE?") == text_hash("how wide") != text_hash("how wide is it")


def test_item_of_a_row(gradient):
    item = make_item("x", 3, row(gradient), CONFIG)
    assert (item.question, item.answers, item.problem) == ("<image>How wide?", ("4",), "")
    assert item.boxes == (((0, 0, 8, 8),),) and item.words == "How wide?"


def test_verl_rows_and_single_images(gradient):
    config = InputConfig(
        files=["x"], question="prompt", answer="reward_model.ground_truth", boxes="extra_info.boxes", images="image"
    )
    values = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Look: <image> how wide?"}],
        "reward_model": {"ground_truth": ["4", "four"]},
        "image": encoded(gradient),
        "extra_info": {"boxes": [[0, 0, 8, 8]]},
    }
    item = make_item("x", 0, values, config)
    assert item.question == "Look: <image> how wide?" and item.answers == ("4", "four")
    assert item.boxes == (((0, 0, 8, 8),),)
    values["prompt"][1]["content"] = [{"type": "image"}, {"type": "text", "text": "how wide?"}]
    assert make_item("x", 0, values, config).question == "<image>how wide?"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"question": " "}, "a question must have words"),
        ({"question": None}, "a question must have words"),
        ({"answer": None}, "ground_truth must not be None"),
        ({"answer": True}, "ground_truth must be a str, a number or a list"),
        ({"images": []}, "an item must have an image"),
        ({"images": None}, "an item must have an image"),
        ({"images": [{"bytes": b"no image"}]}, "an image must be in a format that Pillow reads"),
        ({"images": ["/nowhere/a.png"]}, "an image file must exist"),
        (
            {"question": [{"role": "user", "content": [{"type": "text", "text": "an <image>"}]}]},
            "must not spell a marker",
        ),
        ({"question": [{"role": "user", "content": [{"type": "audio"}]}]}, "a block must have the type text"),
        ({"question": "<image> and <image>?"}, "a question must have a <image> for every image; got 2 for 1"),
        ({"boxes": [[], []]}, "boxes must be a list for every image; got 2 for 1"),
        ({"boxes": [[[0, 0, 65, 8]]]}, "a box must be .* within its image of .48, 64."),
        ({"boxes": [[[8, 0, 8, 8]]]}, "a box must be"),
    ],
)
def test_a_row_that_cannot_be_used_keeps_its_reason(gradient, changes, problem):
    item = make_item("x", 0, row(gradient, **changes), CONFIG)
    assert re.search(problem, item.problem)


def test_the_name_is_the_content(gradient):
    one, same = (make_item("x", number, row(gradient), CONFIG) for number in range(2))
    assert one.id == same.id != make_item("x", 0, row(gradient, answer="5"), CONFIG).id
    assert one.id != make_item("x", 0, row(gradient, images=[encoded(gradient.rotate(180))]), CONFIG).id
    broken = [make_item("x", number, row(gradient, images=[]), CONFIG).id for number in range(2)]
    assert broken[0] != broken[1]


def test_packed_and_unpacked(gradient):
    item = make_item("x", 3, row(gradient), CONFIG)
    assert unpack(pack(item)) == item
    assert unpack(pack(Item("x", 1, problem="why"))) == Item("x", 1, problem="why")
