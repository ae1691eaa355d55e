# SPDX-License-Identifier: Apache-2.0
"""The cold-start reader on small files of LLaMA-Factory's ShareGPT layouts."""

import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from avar_verl.data.check import Settings, check_files
from avar_verl.data.images import open_image
from avar_verl.plugin.datasets.check_rendered import Rendering
from avar_verl.tools.demo.photo_grid import load_photo
from recipes.avar.data import avar_coldstart
from recipes.avar.data.avar_coldstart import convert, convert_files, is_val

PHOTOS = {"geo/cat.png": "chelsea.png", "geo/coffee.jpg": "coffee.png", "m3cot/rocket.png": "rocket.jpg"}
RESPONSE = "<think>I look back at the picture.</think>\n<answer>a cat</answer>"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("coldstart") / "images"
    for name, photo in PHOTOS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        load_photo(photo).resize((84, 56)).save(root / name)
    return root


def messages(question="<image>What is it?", response=RESPONSE):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]


def conversations(question="<image>What is it?", response=RESPONSE):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": response}]


ROWS = [
    {"messages": messages(), "images": ["geo/cat.png"]},
    {"conversations": conversations(), "image": "geo/coffee.jpg", "source": "M3CoT"},
    {"conversations": conversations("<image><image>Which is it?"), "images": list(PHOTOS)[:2], "system": "Look twice."},
    {"messages": [{"role": "system", "content": "Look."}, *messages("What is it?")], "images": [], "dataset": "text"},
    {"conversations": conversations("What is it?", "A cat."), "image": ""},
]


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        columns = dict.fromkeys(key for row in rows for key in row)
        rows = [{key: row.get(key) for key in columns} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["avar_coldstart", *map(str, arguments)])
    avar_coldstart.main()


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_both_layouts_from_every_kind_of_file(images, tmp_path, suffix):
    data = write(tmp_path / f"data.{suffix}", ROWS)
    counts = convert_files([data], tmp_path / "out", images)
    assert counts == {"train": 5, "val": 0, "rejects": 0, "unformatted": 1}
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert [row["source"] for row in rows] == ["avar_coldstart", "M3CoT", "avar_coldstart", "text", "avar_coldstart"]
    assert [[turn["role"] for turn in row["messages"]][:2] for row in rows] == [
        ["user", "assistant"], ["user", "assistant"], ["system", "user"], ["system", "user"], ["user", "assistant"]
    ]  # fmt: skip
    assert rows[0]["messages"] == messages() and rows[2]["messages"][0]["content"] == "Look twice."
    assert [len(row["images"]) for row in rows] == [1, 1, 2, 0, 0]
    assert rows[2]["images"][0] == {"bytes": (images / "geo/cat.png").read_bytes()}  # The file's own bytes.
    assert (tmp_path / "out" / "rejects.jsonl").read_text() == ""
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rejects.jsonl", "train.parquet"]


def test_the_trainer_reads_what_is_written(images, tmp_path, tiny_model_path):
    from omegaconf import OmegaConf
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
    from verl.utils.tokenizer import hf_processor

    convert_files([write(tmp_path / "data.jsonl", ROWS)], tmp_path, images)
    report = check_files(tmp_path / "train.parquet", Settings(model=str(tiny_model_path)), Rendering)
    assert report.rows == {"sft": 5} and report.findings == []
    processor = hf_processor(str(tiny_model_path))
    config = OmegaConf.create({"max_length": 1024, "pad_mode": "no_padding"})
    samples = MultiTurnSFTDataset(str(tmp_path / "train.parquet"), processor.tokenizer, config, processor=processor)
    assert [len(samples[row]["input_ids"]) for row in range(5)] == report.num_tokens


BAD = {
    "an image file must be readable; got '.*dog.png': No such file": {"messages": messages(), "images": ["dog.png"]},
    "an image must be in a format that Pillow reads": {"messages": messages(), "image": "notes.txt"},
    "<image> must occur once for each of `images`; got 1 for 0": {"messages": messages()},
    "got 0 for 1": {"messages": messages("What is it?"), "images": ["geo/cat.png"]},
    "a turn must have a role of .*'role': 'bot'": {"messages": [{"role": "bot", "content": "Hello."}]},
    "a turn must have a role of .* and text; got": {"messages": [{"role": "user", "content": None}]},
    "a turn must be an object; got 'Hello.'": {"messages": ["Hello."]},
    "a row must have a list `messages` or `conversations`; got the columns": {"question": "What?"},
    "the last turn of sft must be the assistant's": {"conversations": conversations("What?")[:1]},
    "a response must say something": {"conversations": conversations("What?", " ")},
    "a response must be text; got <image>": {"messages": messages("What?", "<image>"), "images": ["geo/cat.png"]},
    "an image must be a file or bytes; got .*https://": {"messages": messages(), "image": "https://example.org/a.png"},
}


def test_bad_rows_are_kept_with_their_reason(images, tmp_path, monkeypatch, capsys):
    (images / "notes.txt").write_text("no image")
    data = write(tmp_path / "data.jsonl", [ROWS[0], *BAD.values(), ROWS[1]])
    run(monkeypatch, "--data", data, "--images", images, "--out", tmp_path / "out")
    assert f"train.parquet: 2 rows, val.parquet: 0 rows\n{tmp_path}/out/rejects.jsonl: 12 rows\n0 responses" in (
        capsys.readouterr().out
    )
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == list(range(1, 13)) and rejects[0]["file"] == str(data)
    assert [reject["values"] for reject in rejects] == list(BAD.values())
    for message, reject in zip(BAD, rejects, strict=True):
        with pytest.raises(ValueError, match=message):
            raise ValueError(" ".join(reject["reasons"]))


def test_paths_are_kept_when_asked(images, tmp_path, monkeypatch):
    embedded = {"messages": messages(), "images": [{"bytes": (images / "geo/cat.png").read_bytes(), "path": None}]}
    data = write(tmp_path / "data.parquet", [embedded])
    with_paths = write(tmp_path / "data.jsonl", ROWS)
    run(monkeypatch, "--data", data, with_paths, "--images", images, "--out", tmp_path / "out", "--keep-paths")
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert len(rows) == 5 and rows[0]["images"] == [{"image": str(images / "geo/cat.png")}]
    assert np.array_equal(open_image(rows[0]["images"][0]), load_photo("chelsea.png").resize((84, 56)))
    (reject,) = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert "an image must be a file; got {'bytes'" in reject["reasons"][0] and "keep_paths" in reject["reasons"][0]
    assert reject["values"]["images"][0]["bytes"].endswith(" bytes")


def test_markers_are_put_in_front_when_asked(images, tmp_path):
    rows = [{**ROWS[2], "conversations": conversations("Which?")}, ROWS[1]]
    counts = convert_files([write(tmp_path / "data.jsonl", rows)], tmp_path, images, prepend_markers=True)
    assert counts["train"] == 2 and counts["rejects"] == 0
    rows = pyarrow.parquet.read_table(tmp_path / "train.parquet").to_pylist()
    assert [row["messages"][-2]["content"] for row in rows] == ["<image><image>Which?", "<image>What is it?"]


def test_the_split_goes_by_image_and_seed(images, tmp_path):
    rows = [{"messages": messages(f"What is {n}?")} for n in range(300)]
    rows += [{"messages": messages(f"<image>{n}"), "image": name} for n in range(5) for name in PHOTOS]
    data = write(tmp_path / "data.jsonl", rows)
    counts = convert_files([data], tmp_path / "a", images, val_fraction=0.3)
    assert counts["train"] + counts["val"] == 315 and 60 < counts["val"] < 130
    again = convert_files([data], tmp_path / "b", images, val_fraction=0.3)
    assert again == counts and (tmp_path / "a/val.parquet").read_bytes() == (tmp_path / "b/val.parquet").read_bytes()
    val = {image["bytes"] for row in read(tmp_path / "a/val.parquet") for image in row["images"]}
    train = {image["bytes"] for row in read(tmp_path / "a/train.parquet") for image in row["images"]}
    assert not val & train and len(val | train) == 3
    converted = [convert(row, images) for row in rows]
    splits = [[is_val(row, 0.3, seed) for row in converted] for seed in (0, 1)]
    assert sum(splits[0]) == counts["val"] and splits[0] != splits[1]
    convert_files([data], tmp_path / "a", images)  # Without a split, no file of the earlier one stays.
    assert not (tmp_path / "a/val.parquet").exists() and len(read(tmp_path / "a/train.parquet")) == 315


def read(path):
    return pyarrow.parquet.read_table(path).to_pylist()


def test_rows_are_written_as_they_come(images, tmp_path, monkeypatch):
    monkeypatch.setattr(avar_coldstart, "GROUP_ROWS", 8)
    data = write(tmp_path / "data.jsonl", [{"messages": messages(f"What is {n}?")} for n in range(20)])
    convert_files([data], tmp_path, images)
    assert pyarrow.parquet.ParquetFile(tmp_path / "train.parquet").num_row_groups == 3
    monkeypatch.setattr(avar_coldstart, "GROUP_BYTES", 1)
    convert_files([write(tmp_path / "data.jsonl", ROWS)], tmp_path, images)
    assert pyarrow.parquet.ParquetFile(tmp_path / "train.parquet").num_row_groups == 4


def test_what_cannot_be_done_leaves_no_half_file(images, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"val_fraction must be in \[0, 1\); got 1.0"):
        convert_files([data], tmp_path / "out", images, val_fraction=1.0)
    data.write_text(data.read_text() + "{broken\n")
    with pytest.raises(SystemExit, match="avar_coldstart: line 6 of .*data.jsonl must be JSON"):
        run(monkeypatch, "--data", data, "--images", images, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejects.jsonl"]
    with pytest.raises(ValueError, match="a training needs at least one row; got .*'rejects': 3"):
        convert_files([write(tmp_path / "data.json", ROWS[:3])], tmp_path / "out", tmp_path / "nowhere")
