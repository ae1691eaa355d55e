# SPDX-License-Identifier: Apache-2.0
"""The RL data set: pictures and prompts of verl's, and no picture in a prompt."""

import asyncio
import io
import pickle

import datasets
import numpy
import pytest
from omegaconf import OmegaConf
from PIL import Image
from verl.utils import hf_processor
from verl.utils.dataset.rl_dataset import RLHFDataset, get_dataset_class

from avar_verl.plugin.datasets.rl import AvarRLDataset


def picture(seed: int, mode: str = "RGB", size=(120, 90)) -> Image.Image:
    channels = len(mode)
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=numpy.uint8)
    return Image.fromarray(pixels, mode)


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def row(*images, text: str = "What is it?") -> dict:
    return {
        "data_source": "test",
        "prompt": [{"role": "user", "content": "<image>" * len(images) + text}],
        "images": list(images),
        "reward_model": {"style": "rule", "ground_truth": "a"},
        "extra_info": {"index": 0},
    }


@pytest.fixture(scope="module")
def processor(tiny_model_path):
    return hf_processor(tiny_model_path)


@pytest.fixture
def load(processor, tmp_path):
    """`load(cls, rows or a path, **data)` -> the data set."""

    def make(cls, rows, **data):
        path = tmp_path / "rows.parquet"
        if isinstance(rows, datasets.Dataset):
            rows.to_parquet(path)
        else:
            datasets.Dataset.from_list(rows).to_parquet(path)
        settings = {"cache_dir": str(tmp_path / "cache"), "filter_overlong_prompts_workers": 1, "return_raw_chat": True}
        config = OmegaConf.create({**settings, "max_prompt_length": 512, **data})
        return cls(str(path), processor.tokenizer, config, processor)

    return make


def pictures(cls, messages) -> list[bytes]:
    """What the agent loop hands to the processor."""
    made, _, _ = asyncio.run(cls.process_multi_modal_info(messages, image_patch_size=14, config=OmegaConf.create()))
    older, _ = asyncio.run(cls.process_vision_info(messages, 14, OmegaConf.create()))
    assert [image.tobytes() for image in older] == [image.tobytes() for image in made]
    return [image.tobytes() + str((image.size, image.mode)).encode() for image in made]


def texts(messages) -> list:
    return [[block.get("text", block["type"]) for block in message["content"]] for message in messages]


def check_same(stock: RLHFDataset, ours: AvarRLDataset, index: int = 0) -> list[dict]:
    theirs, mine = stock[index], ours[index]
    assert type(ours) is AvarRLDataset and theirs.keys() == mine.keys() | {"prompt"}
    assert texts(theirs["raw_prompt"]) == texts(mine["raw_prompt"])
    before = pickle.dumps(mine["raw_prompt"])
    assert pictures(AvarRLDataset, mine["raw_prompt"]) == pictures(RLHFDataset, theirs["raw_prompt"])
    assert pickle.dumps(mine["raw_prompt"]) == before  # No picture was put into the prompt.
    assert b"PIL" in pickle.dumps(theirs["raw_prompt"]) and b"PIL" not in before
    template = ours.processor.apply_chat_template
    assert template(theirs["raw_prompt"], tokenize=False) == template(mine["raw_prompt"], tokenize=False)
    return [block for message in mine["raw_prompt"] for block in message["content"] if block["type"] == "image"]


def test_bytes_stay_bytes(load):
    """Of two images in a row; transparency is put on white, and the row's own limit of pixels applies."""
    clear, photo = file_of(picture(0, "RGBA")), file_of(picture(1, size=(400, 300)), "JPEG")
    rows = [row({"bytes": clear, "max_pixels": None}, {"bytes": photo, "max_pixels": 28 * 28 * 40})]
    blocks = check_same(load(RLHFDataset, rows), load(AvarRLDataset, rows))
    assert [block["bytes"] for block in blocks] == [clear, photo] and not any("image" in block for block in blocks)


def test_paths_stay_paths(load, tmp_path, monkeypatch):
    """verl opens a relative one from where its worker runs; here it is that of the process that reads the rows."""
    (tmp_path / "a.png").write_bytes(file_of(picture(0)))
    monkeypatch.chdir(tmp_path)
    ours = load(AvarRLDataset, [row({"image": "a.png"})])[0]["raw_prompt"]
    theirs = load(RLHFDataset, [row({"image": "a.png"})])[0]["raw_prompt"]
    assert pictures(AvarRLDataset, ours) == pictures(RLHFDataset, theirs)
    assert ours[0]["content"][0] == {"type": "image", "image": str(tmp_path / "a.png")}


def test_a_column_of_images_is_not_decoded(load):
    """datasets would decode it, and verl's data set then drops the transparency of what it gets."""
    features = datasets.Features({"images": datasets.List(datasets.Image())})
    rows = datasets.Dataset.from_list([row()]).remove_columns("images")
    rows = rows.map(lambda _: {"images": [{"bytes": file_of(picture(0, "RGBA"))}]}, features=None)
    rows = rows.cast_column("images", features["images"])
    rows = rows.map(lambda _: {"prompt": [{"role": "user", "content": "<image>What?"}]})
    blocks = check_same(load(RLHFDataset, rows), load(AvarRLDataset, rows))
    assert blocks[0]["bytes"] == file_of(picture(0, "RGBA"))


def test_images_of_rows_are_written_once(load, tmp_path):
    content = file_of(picture(0, "RGBA"))
    rows = [row({"bytes": content}), row({"bytes": content}), row({"bytes": file_of(picture(1))})]
    folder = tmp_path / "pictures" / "of the run"
    ours, stock = load(AvarRLDataset, rows, image_folder=str(folder)), load(RLHFDataset, rows)
    blocks = [check_same(stock, ours, index)[0] for index in range(3)]
    assert not any("bytes" in block for block in blocks)
    assert blocks[0] == blocks[1] != blocks[2]
    assert len(list(folder.iterdir())) == 2 and (folder / blocks[0]["image"]).read_bytes() == content


def test_text_rows_and_long_prompts_are_those_of_verl(load):
    rows = [row(), row({"bytes": file_of(picture(0))}), row({"bytes": file_of(picture(0))}, text="What? " * 100)]
    stock, ours = load(RLHFDataset, rows, max_prompt_length=100), load(AvarRLDataset, rows, max_prompt_length=100)
    assert len(ours) == len(stock) == 2
    assert ours[0]["raw_prompt"] == stock[0]["raw_prompt"] == row()["prompt"] and "prompt" not in ours[0]


def test_what_verl_cannot_open(load):
    content = file_of(picture(0))
    ours = load(AvarRLDataset, [row(content)])
    assert ours[0]["raw_prompt"][0]["content"][0] == {"type": "image", "bytes": content}
    assert len(pictures(AvarRLDataset, ours[0]["raw_prompt"])) == 1


def test_rejects(load):
    good = [row({"bytes": file_of(picture(0))})]
    for folder in ("pictures", "./pictures"):
        with pytest.raises(ValueError, match="data.image_folder must be null or an absolute path.*; got .*pictures"):
            load(AvarRLDataset, good, image_folder=folder)
    bad = load(AvarRLDataset, [row({"bytes": b"not an image"})], filter_overlong_prompts=False)
    with pytest.raises(ValueError, match="an image must be in a format that Pillow reads; got 12 bytes"):
        pictures(AvarRLDataset, bad[0]["raw_prompt"])
    unknown = load(AvarRLDataset, [row({"number": 3})], filter_overlong_prompts=False)
    with pytest.raises(ValueError, match="an image dict must have one of the keys"):
        unknown[0]


def test_a_bad_image_is_not_written(load, tmp_path):
    folder = tmp_path / "pictures"
    rows = [row({"bytes": b"not an image"})]
    ours = load(AvarRLDataset, rows, filter_overlong_prompts=False, image_folder=str(folder))
    with pytest.raises(ValueError, match="an image must be in a format that Pillow reads"):
        ours[0]
    assert not list(folder.iterdir())


def test_the_recipe_loads_it():
    from tests.plugin.test_config import recipe

    config = recipe("avar_grpo", "machine=cpu_grpo")
    assert get_dataset_class(config.data) is AvarRLDataset and config.data.image_folder is None
