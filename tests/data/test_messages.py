# SPDX-License-Identifier: Apache-2.0
"""The reader of conversations: what text, blocks and numpy's arrays become, and what is refused."""

import numpy
import pandas
import pytest

from avar_verl.data.messages import (
    as_list,
    blocks_of,
    images_of,
    is_trained,
    place_images,
    read_messages,
    text_of,
    turns_of,
)

TEXT = {"type": "text", "text": "What?"}


def user(content) -> dict:
    return {"role": "user", "content": content}


def test_markers_are_images_in_data_files_and_text_elsewhere():
    text = "a <image><video> b"
    a, b = {"type": "text", "text": "a "}, {"type": "text", "text": " b"}
    assert blocks_of(text, markers=True) == [a, {"type": "image"}, {"type": "video"}, b]
    assert blocks_of(text) == [{"type": "text", "text": text}]
    assert (blocks_of("", markers=True), blocks_of("")) == ([], [{"type": "text", "text": ""}])
    spelled = [{"type": "text", "text": "the marker <image>"}]
    assert blocks_of(spelled, markers=True) == spelled


def test_keys_that_parquet_adds_are_left_out(tmp_path):
    content = [{"type": "image", "text": None}, {"image": None, **TEXT}]
    assert blocks_of(content) == [{"type": "image"}, TEXT]
    pandas.DataFrame({"messages": [[user(content)]], "images": [[{"bytes": b"1"}]]}).to_parquet(tmp_path / "a.parquet")
    row = pandas.read_parquet(tmp_path / "a.parquet").iloc[0]
    assert isinstance(row["messages"], numpy.ndarray) and isinstance(row["images"], numpy.ndarray)
    assert read_messages(row["messages"]) == [user([{"type": "image"}, TEXT])]
    assert as_list(row["images"]) == [{"bytes": b"1"}]


def test_one_image_and_none_are_lists_too():
    assert (as_list("a.png"), as_list({"bytes": b"1"}), as_list(None), as_list(("a", "b"))) == (
        ["a.png"],
        [{"bytes": b"1"}],
        [],
        ["a", "b"],
    )


@pytest.mark.parametrize("text", ["", "What?", "<image>What?", "a <video> b<image><image>"])
def test_text_of_is_the_inverse(text):
    assert text_of(blocks_of(text, markers=True)) == text_of(text) == text


def test_images_stand_in_their_order():
    messages = read_messages([user("<image> and <image>?"), {"role": "assistant", "content": "Yes."}, user("<image>")])
    placed = place_images(messages, ["a", "b", "c"], str.upper)
    assert images_of(placed) == ["A", "B", "C"]
    assert [block["type"] for block in placed[0]["content"]] == ["image", "text", "image", "text"]
    assert images_of(place_images(placed, [1, 2, 3])) == [1, 2, 3]
    assert images_of([user("<image>")]) == []


def test_tool_calls_are_kept_where_no_data_file_is_read():
    turn = {"role": "assistant", "content": "Look.", "tool_calls": [{"name": "zoom"}], "name": None}
    assert read_messages([turn], markers=False) == [{**turn, "content": [{"type": "text", "text": "Look."}]}]
    for calls in (turn["tool_calls"], [], False):  # Only None, which parquet writes, is no key.
        with pytest.raises(ValueError, match=r"nothing else; got \['tool_calls'\] in turn 0"):
            read_messages([{**turn, "tool_calls": calls}])
    assert read_messages([{**turn, "tool_calls": None}]) == [
        {"role": "assistant", "content": [{**TEXT, "text": "Look."}]}
    ]


@pytest.mark.parametrize(
    ("role", "flags", "trained"),
    [
        ("assistant", {}, True),
        ("assistant", {"loss_mask": 0}, False),
        ("assistant", {"loss_mask": 1}, True),
        ("assistant", {"trainable": False}, False),
        ("assistant", {"loss_mask": None, "trainable": True}, True),
        ("assistant", {"loss_mask": 0.0, "trainable": False}, False),
        ("user", {}, False),
        ("user", {"loss_mask": 0, "trainable": False}, False),
        ("assistant", {"loss_mask": 2}, "must be 0 or 1; got {'loss_mask': 2}"),
        ("assistant", {"trainable": "no"}, "must be 0 or 1; got {'trainable': 'no'}"),
        ("assistant", {"loss_mask": [1, 0]}, "must be 0 or 1"),
        ("assistant", {"loss_mask": 0, "trainable": True}, "must agree"),
        ("user", {"loss_mask": 1}, "only assistant turns are trained on; got .* in a user turn"),
    ],
)
def test_flags_of_a_turn(role, flags, trained):
    turn = {"role": role, "content": "a", **flags}
    if isinstance(trained, str):
        for read in (is_trained, lambda turn: read_messages([turn])):
            with pytest.raises(ValueError, match=trained):
                read(turn)
    else:
        assert is_trained(turn) is trained
        assert is_trained(read_messages([turn])[0]) is trained


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "content must be text or a list of blocks; got None"),
        (3, "content must be text or a list of blocks; got 3"),
        (["a"], r"content must be text or a list of blocks; got \['a'\]"),
        ([{"type": "audio"}], "a block must have the type text, image or video; got {'type': 'audio'}"),
        ([{"text": "a"}], "a block must have the type text, image or video"),
        ([{"type": "text", "text": None}], "a text block must hold text"),
        ([{"type": "text", "text": "a", "image": "a.png"}], r"a text block must hold no image; got \['image'\]"),
    ],
)
def test_content_that_is_refused(content, message):
    with pytest.raises(ValueError, match=f"turn 1: {message}"):
        read_messages([user("a"), user(content)])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "`prompt` must be a list of turns; got None"),
        ([], r"`prompt` must be a list of turns; got \[\]"),
        ("What?", "`prompt` must be a list of turns; got 'What"),
        ([user("a"), "b"], "a turn must have role and content; got 'b' as turn 1"),
        ([{"role": "user"}], "a turn must have role and content; got {'role': 'user'} as turn 0"),
    ],
)
def test_conversations_that_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        turns_of(messages, "prompt")


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        ("<image>", [], "got 1 markers for 0 images"),
        ("What?", ["a"], "got 0 markers for 1 images"),
        ("<image><image>", ["a"], "got 2 markers for 1 images"),
        ("<video>", [], "must hold text and images; got a video"),
    ],
)
def test_images_that_do_not_fit(content, images, message):
    with pytest.raises(ValueError, match=message):
        place_images(read_messages([user(content)]), images)


def test_text_of_refuses_what_it_could_not_write():
    with pytest.raises(ValueError, match="the text of a block must not spell a marker; got 'an <image>'"):
        text_of([{"type": "text", "text": "an <image>"}])
