# SPDX-License-Identifier: Apache-2.0
"""Rows of every layout become conversations, or an error that names the rule."""

import io
import json

import pytest
from PIL import Image

from avar_verl.data.rows import Row
from avar_verl.tools.demo import photo_grid
from avar_verl.tools.rows import conversation, count, is_file, read, renamed


def picture(color: str = "red", size: tuple[int, int] = (112, 56)) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}


QUESTION = {"role": "user", "content": "<image>What?"}
ANSWER = {"role": "assistant", "content": "That."}


def texts(one) -> list[tuple[str, str]]:
    return [(m["role"], "".join(b.get("text", "<image>") for b in m["content"])) for m in one.prompt]


def test_a_row_of_the_cold_start():
    one = conversation({"messages": [QUESTION, ANSWER], "images": [picture()], "boxes": None})
    assert texts(one) == [("user", "<image>What?")] and one.response == [{"type": "text", "text": "That."}]
    assert one.turns and one.response_ids is None and one.images[0].size == (112, 56)


def test_a_row_of_the_cold_start_without_an_answer():
    one = conversation({"messages": [QUESTION, ANSWER, {"role": "user", "content": "And?"}], "images": [picture()]})
    assert one.response is None and len(one.prompt) == 3


def test_rows_of_grpo():
    row = {"prompt": [QUESTION], "images": [picture()], "reward_model": {"ground_truth": "That"}}
    assert conversation(row).response is None and not conversation(row).turns
    assert conversation({**row, "response": "This."}).response == "This."
    assert conversation({**row, "response_ids": (1, 2)}).response_ids == [1, 2]


@pytest.mark.parametrize(
    "row, text",
    [
        ({"question": "What?", "image": Image.new("RGB", (56, 56))}, "<image>What?"),
        ({"question": "What?", "images": [picture(), picture()]}, "<image><image>What?"),
        ({"prompt": "Look <image> here", "images": picture()}, "Look <image> here"),
        ({"question": "What?", "images": None}, "What?"),
        ({"question": "What?"}, "What?"),
    ],
)
def test_a_question_in_one_text(row, text):
    one = conversation(row)
    assert texts(one) == [("user", text)] and len(one.images) == text.count("<image>")


def test_a_system_turn_is_added_where_there_is_none():
    assert texts(conversation({"question": "What?"}, system="Look."))[0] == ("system", "Look.")
    row = {"prompt": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "What?"}]}
    assert [role for role, _ in texts(conversation(row, system="Look."))] == ["system", "user"]
    assert texts(conversation(row, system="Look."))[0] == ("system", "Mine.")


def test_settings_of_the_template_and_of_an_image():
    one = conversation({"question": "What?", "tools": [{"name": "zoom"}], "enable_thinking": False})
    assert one.template_kwargs == {"tools": [{"name": "zoom"}], "enable_thinking": False}
    small = conversation({"question": "What?", "image": {**picture(size=(560, 560)), "max_pixels": 28 * 28 * 16}})
    assert max(small.images[0].size) <= 112


def test_equal_prompts_have_equal_digests():
    row = {"messages": [QUESTION, ANSWER], "images": [picture()]}
    digest = conversation(row).digest
    assert len(digest) == 16 and digest == conversation({**row, "messages": [QUESTION]}).digest
    assert digest == conversation({"prompt": [QUESTION], "images": [picture()], "response": "Else."}).digest
    others = [
        {**row, "images": [picture("blue")]},
        {**row, "images": [picture(size=(56, 112))]},
        {**row, "messages": [{"role": "user", "content": "<image>What"}, ANSWER]},
        {**row, "messages": [{"role": "user", "content": "What?<image>"}, ANSWER]},
    ]
    assert len({digest, *(conversation(other).digest for other in others)}) == 5


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "What?"}, r"one of the columns .* got \['text'\]"),
        ({"messages": "What?"}, "`messages` must be a list of turns"),
        ({"prompt": []}, "`prompt` must be a list of turns"),
        ({"messages": [QUESTION, ANSWER], "images": []}, "1 markers for 0 images"),
        ({"messages": [QUESTION, ANSWER], "images": [picture()], "response": "x"}, r"got \['message', 'response'\]"),
        ({"question": "What?", "response": "x", "response_ids": [1]}, r"got \['response', 'response_ids'\]"),
        ({"question": "What?", "image": {"bytes": b"nothing"}}, "format that Pillow reads"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        conversation(row)


# ---- files and data sets ---------------------------------------------------------------------------------------


def test_files_are_read_in_order(tmp_path):
    photo_grid.make_sft_parquet(tmp_path / "a.parquet", 3, 0)
    photo_grid.make_sft_parquet(tmp_path / "b.parquet", 2, 1)
    rows = list(read(str(tmp_path)))
    assert [row.index for row in rows] == [0, 1, 2, 3, 4] and count(str(tmp_path)) == 5
    assert rows[3].where == f"row 0 of {tmp_path / 'b.parquet'}"
    assert conversation(rows[3].values).images[0].size == (112, 112)


def test_columns_are_renamed():
    values = {"query": "q", "question": "not this", "decoded_image": 1, "image": "path", "answer": 2}
    assert renamed(values, {"question": "query", "image": "decoded_image"}) == {"question": "q", "image": 1}
    assert renamed(values, {}) == {"question": "not this", "image": "path"}
    assert renamed({"messages": 1, "text": "q", "images": 2}, {"question": "text"}) == {"images": 2, "question": "q"}
    with pytest.raises(ValueError, match=r"columns must be those of the data; got \['query'\]"):
        renamed({"a": 1}, {"question": "query"})


def test_what_is_a_file_and_what_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert all(map(is_file, ("data", "x.parquet", "a/b.jsonl", "a/b/c", str(tmp_path))))
    assert not any(map(is_file, ("AI4Math/MathVista", "lmms-lab/MMMU", "cifar10")))


def test_a_data_set_of_the_hub_is_streamed(monkeypatch):
    import datasets

    taken = []

    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("owner/name", "testmini", True)
        for number in range(100):
            taken.append(number)
            yield {"query": f"What {number}?", "decoded_image": Image.new("RGB", (56, 56))}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("owner/name", "testmini", {"question": "query", "image": "decoded_image"})
    first = next(rows)
    assert isinstance(first, Row) and first.where == "row 0 of owner/name" and len(taken) == 1
    assert texts(conversation(next(rows).values)) == [("user", "<image>What 1?")]
    assert count("owner/name") is None


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    import datasets

    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="that the hub serves; got 'owner/name': no route"):
        next(read("owner/name", "test"))


@pytest.mark.parametrize(
    "data, split, message",
    [
        ("owner/name", None, "a data set of the hub has splits; got none for 'owner/name'"),
        ("missing.parquet", None, "a data file must exist"),
        ("data.jsonl", "test", "splits are those of data sets of the hub; got split='test'"),
    ],
)
def test_data_that_are_refused(tmp_path, monkeypatch, data, split, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "What?"}) + "\n")
    with pytest.raises(ValueError, match=message):
        next(read(data, split))
