# SPDX-License-Identifier: Apache-2.0
"""Rows of data files, and what is sent for them."""

import io
from base64 import b64decode
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps
from qwen_vl_utils import process_vision_info

from avar_verl.plugin.datasets.images import open_resized
from avar_verl.tools.demo import photo_grid
from avar_verl.tools.questions import Question, data_uri, file_questions
from tests.data.odd_images import ODD_IMAGES
from tests.tools.evaluate.conftest import png


def _item(**changes) -> Question:
    fields = {
        "task": "t",
        "id": "1",
        "messages": ({"role": "user", "content": "<image>What?"},),
        "sources": (png(1),),
        "ground_truth": ("x",),
    }
    return Question(**{**fields, **changes})


def test_images_stand_where_the_text_says():
    item = _item(
        messages=(
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "First <image>, then <image><image>?"},
        ),
        sources=(png(1), png(2), png(3)),
    )
    system, user = item.chat()
    uris = [data_uri(picture) for picture in item.images]
    assert len(set(uris)) == 3
    assert system == {"role": "system", "content": "Be brief."}
    kinds = [part["text"] if part["type"] == "text" else part["image_url"]["url"] for part in user["content"]]
    assert kinds == ["First ", uris[0], ", then ", uris[1], uris[2], "?"]


def test_the_hash_depends_on_everything_that_is_asked_or_graded():
    hashes = [
        _item().prompt_hash(),
        _item(messages=({"role": "user", "content": "<image>Why?"},)).prompt_hash(),
        _item(sources=(png(2),)).prompt_hash(),
        _item(ground_truth=("y",)).prompt_hash(),
        _item(ground_truth=("A",), options=("x", "y")).prompt_hash(),
        _item(groups={"f": "1"}).prompt_hash(),
    ]
    assert len(set(hashes)) == len(hashes)
    assert _item(id="2").prompt_hash() == hashes[0]


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_what_is_sent_is_what_training_sees(name, tmp_path):
    """However the server opens it: turned by EXIF, on another ground, or as it is."""
    value = ODD_IMAGES[name]
    (tmp_path / "image").write_bytes(value["bytes"])
    limits = {key: limit for key, limit in value.items() if key != "bytes"}
    for held in (value, {"image": str(tmp_path / "image"), **limits}):
        (item,) = _write(tmp_path, images=[held])
        (part,) = [part for part in item.chat()[0]["content"] if part["type"] == "image_url"]
        content = b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert content == item.images[0]
        with Image.open(io.BytesIO(content)) as image:
            assert image.mode == "RGB" and not image.getexif() and "transparency" not in image.info
            sent = ImageOps.exif_transpose(image)
        trained = open_resized(held, 14)
        assert sent.size == trained.size and sent.tobytes() == trained.tobytes()
        (rolled_out,), _ = process_vision_info([{"role": "user", "content": [{"type": "image", **as_rl(held)}]}])
        assert sent.tobytes() == rolled_out.tobytes()


def as_rl(held: dict) -> dict:
    """What verl's data set for RL makes of an image of a row (verl/utils/dataset/rl_dataset.py, `_build_messages`)."""
    return {**held, "image": Image.open(io.BytesIO(held["bytes"]))} if "bytes" in held else held


def test_limits_and_patches_decide_the_size(tmp_path):
    (item,) = _write(tmp_path, images=[ODD_IMAGES["max_pixels"]])
    assert [image.size for image in item.pictures()] == [(56, 56)]
    (other,) = _write(tmp_path, images=[ODD_IMAGES["EXIF 1"]])
    assert [image.size for image in replace(other, patch_size=16).pictures()] == [(128, 96)]
    bare = replace(item, sources=(ODD_IMAGES["max_pixels"]["bytes"],))
    assert bare.prompt_hash() != item.prompt_hash() == replace(item, patch_size=16).prompt_hash()


def test_photo_grid_rows(tmp_path):
    photo_grid.make_rl_parquet(tmp_path / "grid.parquet", 3, 5, "test")
    samples = photo_grid.make_samples(3, 5, "test")
    items = list(file_questions(tmp_path / "grid.parquet"))
    assert [item.task for item in items] == ["grid"] * 3
    assert [item.id for item in items] == ["0", "1", "2"]
    for item, sample in zip(items, samples, strict=True):
        assert item.messages == ({"role": "user", "content": f"<image>{sample.question}"},)
        assert item.ground_truth == (sample.answer,)
        assert item.data_source == photo_grid.DATA_SOURCE
        with Image.open(io.BytesIO(item.images[0])) as image:
            assert image.tobytes() == sample.image.tobytes()


def _write(path, **changes):
    row = {
        "prompt": [{"role": "user", "content": "<image>What?"}],
        "images": [{"bytes": png(1)}],
        "reward_model": {"ground_truth": "A"},
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, **changes}]), path / "rows.parquet")
    return file_questions(path / "rows.parquet")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"prompt": None}, "must have prompt and reward_model.ground_truth"),
        ({"reward_model": {"style": "rule"}}, "must have prompt and reward_model.ground_truth"),
        ({"reward_model": {"ground_truth": ""}}, "ground_truth must not be empty"),
        (
            {"prompt": [{"role": "user", "content": "What?"}]},
            "row 0 of .*: item 0 of rows: .*got 0 markers for 1 images",
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "row 0 of .*: a text block must hold text"),
        ({"prompt": [{"role": "user", "content": "<image><video>?"}]}, "must hold text and images; got a video"),
        ({"prompt": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A"}]}, "must end with"),
        ({"images": [{"image": "https://example.org/a.png"}]}, "images must be bytes or files on this machine"),
        ({"extra_info": {"options": ["x", "y"]}, "reward_model": {"ground_truth": "C"}}, "letter of one of 2 options"),
    ],
)
def test_bad_rows_are_refused(tmp_path, changes, rule):
    with pytest.raises(ValueError, match=rule):
        list(_write(tmp_path, **changes))


def test_blocks_are_the_same_question_as_text(tmp_path):
    blocks = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    (text,), (other,) = _write(tmp_path), _write(tmp_path, prompt=[{"role": "user", "content": blocks}])
    assert text == other and text.prompt_hash() == other.prompt_hash()


def test_options_of_a_row(tmp_path):
    (item,) = _write(tmp_path, extra_info={"options": ["x", "y"]})
    assert item.options == ("x", "y") and item.ground_truth == ("A",)


def test_bytes_that_are_no_image():
    with pytest.raises(ValueError, match="in a format that Pillow reads; got 3 bytes"):
        data_uri(b"abc")
