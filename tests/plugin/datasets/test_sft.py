# SPDX-License-Identifier: Apache-2.0
"""AvarSFTDataset: equal to verl's for Qwen2.5-VL, and what it refuses."""

import json

import pandas
import pytest
import torch
from omegaconf import OmegaConf
from verl.utils import hf_processor, hf_tokenizer
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

from avar_verl.data.check import RowChecker, Settings
from avar_verl.plugin.datasets.check_rendered import Rendering
from avar_verl.plugin.datasets.sft import AvarSFTDataset
from avar_verl.tools.demo import photo_grid
from tests.data.test_check import FORMS, change, clean  # noqa: F401  A fixture.

CONFIG = {"pad_mode": "no_padding", "max_length": 512}


@pytest.fixture(scope="module")
def parts(tiny_model_path):
    return hf_tokenizer(tiny_model_path), hf_processor(tiny_model_path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft") / "sft.parquet"
    photo_grid.make_sft_parquet(path, 4, 0, "train")
    return pandas.read_parquet(path)


@pytest.fixture
def make(parts, tmp_path):
    tokenizer, processor = parts

    def build(rows, cls=AvarSFTDataset, **config):
        path = tmp_path / "rows.parquet"
        pandas.DataFrame(rows).to_parquet(path)
        return cls(str(path), tokenizer, OmegaConf.create({**CONFIG, **config}), processor)

    return build


def two_turns(row) -> dict:
    first, last = row["messages"]
    second = [{"role": "user", "content": "And <image> here?"}, {"role": "assistant", "content": "The same."}]
    system = {"role": "system", "content": "Look twice."}
    return {"messages": [system, first, last, *second], "images": [*row["images"], *row["images"]]}


def test_samples_are_those_of_verl(make, rows):
    cases = [row for _, row in rows[["messages", "images"]].iterrows()]
    cases = [dict(row) for row in cases] + [two_turns(cases[0])]
    ours, verls = make(cases), make(cases, MultiTurnSFTDataset)
    for item in range(len(cases)):
        sample, expected = ours[item], verls[item]
        assert sample.keys() == expected.keys()
        for key in ("input_ids", "loss_mask", "position_ids"):
            assert torch.equal(sample[key], expected[key]), key
        assert sample["multi_modal_inputs"].keys() == expected["multi_modal_inputs"].keys()
        for key, value in sample["multi_modal_inputs"].items():
            assert torch.equal(value, expected["multi_modal_inputs"][key]), key


def test_a_batch_may_start_with_a_text_only_sample(make, rows):
    text = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}], "images": []}
    dataset = make([text, dict(rows.iloc[0][["messages", "images"]])])
    batch = SFTTensorCollator("no_padding")([dataset[0], dataset[1]])
    assert dataset[0]["multi_modal_inputs"] == {} and len(batch["multi_modal_inputs"]) == 2


def test_truncation_keeps_image_tokens_and_a_response(make, rows):
    row = [dict(rows.iloc[0][["messages", "images"]])]
    whole = make(row)[0]
    count = len(whole["input_ids"])
    with pytest.raises(ValueError, match=f"row 0: a sample must have at most .*; got {count}"):
        make(row, max_length=count - 1)[0]
    cut = make(row, max_length=count - 3, truncation="right")[0]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:-3])
    with pytest.raises(ValueError, match="truncation must not cut image tokens"):
        make(row, max_length=8, truncation="right")[0]
    start = int(whole["loss_mask"].argmax())
    with pytest.raises(ValueError, match="must have a response"):
        make(row, max_length=start, truncation="right")[0]
    with pytest.raises(ValueError, match="data.truncation must be one of"):
        make(row, truncation="left")


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([{"role": "user", "content": "<image> <image>?"}, {"role": "assistant", "content": "a"}], 1, "got 2 for 1"),
        ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], 1, "got 0 for 1"),
        ([{"role": "user", "content": "<image>?"}], 1, "the last turn of sft must be the assistant's"),
        (
            [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "a"}],
            0,
            "<video> must occur once",
        ),
        (
            [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a", "tool_calls": ["f"]}],
            1,
            "must have a role and content and nothing else; got \\['tool_calls'\\]",
        ),
        (
            [{"role": "user", "content": "<image> <|image_pad|>"}, {"role": "assistant", "content": "a"}],
            1,
            "text must not spell '<.image_pad.>'",
        ),
    ],
)
def test_a_bad_row_is_named(make, rows, messages, images, message):
    good = dict(rows.iloc[0][["messages", "images"]])
    dataset = make([good, {"messages": messages, "images": [good["images"][0]] * images}])
    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        dataset[1]


def test_urls_are_not_fetched(make, rows):
    row = {"messages": rows.iloc[0]["messages"], "images": [{"image": "https://example.org/cat.png"}]}
    with pytest.raises(ValueError, match="row 0: "):
        make([row])[0]


@pytest.fixture(scope="module")
def checker(tiny_model_path):
    return RowChecker(Settings(model=str(tiny_model_path)), Rendering)


@pytest.mark.parametrize("form", [form for form in FORMS if form[0] == "sft"], ids=lambda form: f"{form[1]}-{form[3]}")
def test_what_the_check_finds_is_refused_and_nothing_else(make, clean, checker, form):  # noqa: F811
    _, path, value, check, _ = form
    row = change(clean["sft"][0], path, value)
    found = {name for name, _ in checker(row, "sft").errors} - {"boxes"}  # Which only RegionSFTDataset reads.
    dataset = make(clean["sft"])
    if found:
        with pytest.raises(ValueError):
            dataset._sample(row)
    else:
        assert bool(dataset._sample(row)["loss_mask"].any())


def trained_on(dataset, item: int) -> str:
    sample = dataset[item]
    return dataset.tokenizer.decode(sample["input_ids"][sample["loss_mask"].bool()])


def test_turns_that_are_not_trained_on(make, checker, tmp_path, parts):
    """From parquet, which adds None, and from json lines, with a byte order mark."""
    ask, wrong, right = (
        {"role": r, "content": c} for r, c in (("user", "A?"), ("assistant", "no"), ("assistant", "yes"))
    )
    flags = [{"loss_mask": 0}, {"trainable": False}, {"loss_mask": 0, "trainable": False}, {}]
    rows = [{"messages": [ask, {**wrong, **flag}, ask, {**right, "loss_mask": 1}], "images": []} for flag in flags]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    from_lines = AvarSFTDataset(str(path), parts[0], OmegaConf.create(CONFIG), parts[1])
    assert [checker(row, "sft").errors for row in rows] == [[]] * 4
    for dataset in (make(rows), from_lines):
        texts = [trained_on(dataset, item) for item in range(4)]
        assert texts == ["yes<|im_end|>\n"] * 3 + ["no<|im_end|>\nyes<|im_end|>\n"]


def test_a_template_that_leaves_reasoning_out(make, checker, parts, monkeypatch):
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "<think>I look.</think>a cat"}]
    row = {"messages": messages, "images": []}
    assert trained_on(make([row]), 0) == "<think>I look.</think>a cat<|im_end|>\n"
    for processor in (parts[1], checker.rendering.processor):
        template = processor.chat_template.replace("content['text'] }}", "content['text'].split('</think>')[-1] }}")
        assert template != processor.chat_template
        monkeypatch.setattr(processor, "chat_template", template)
    with pytest.raises(ValueError, match="row 0: a rendered response must be the row's text; got 'a cat' for '<think>"):
        make([row])[0]
    ((check, message),) = checker(row, "sft").errors
    assert check == "responses" and message.startswith("a rendered response must be the row's text; got 'a cat'")


def test_a_missing_column_and_a_missing_processor(make, rows, parts):
    with pytest.raises(ValueError, match="need a column 'messages'"):
        make(rows[["images"]])
    with pytest.raises(ValueError, match="needs the model's processor"):
        AvarSFTDataset("unread.parquet", parts[0], OmegaConf.create(CONFIG), None)
