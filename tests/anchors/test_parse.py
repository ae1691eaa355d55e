# SPDX-License-Identifier: Apache-2.0
"""Regions, text of the environment, geometry, and properties that hold for every text."""

import gc
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avar_verl.anchors import Anchor, parse_anchors

BOX = '{"bbox_2d": [10, 20, 110, 220]}'


def regions(text):
    return [a.region for a in parse_anchors(text)]


def test_regions():
    text = (
        'Box [10, 21, 31, 41]. <think>Box [10, 22, 32, 42]. <tool_call>{"bbox_2d": [10, 23, 33, 43]}</tool_call>'
        "</think><rethink>Box [10, 24, 34, 44].</rethink><answer>Box [10, 25, 35, 45].</answer> Box [10, 26, 36, 46]."
    )
    assert regions(text) == ["none", "think", "tool_call", "rethink", "answer", "none"]


def test_an_unclosed_tool_call_ends_at_the_next_tag():
    assert regions(f"<tool_call>{BOX}<think>The image shows a cat.</think>") == ["tool_call", "think"]


def test_a_lone_closing_tag_means_that_the_template_opened_it():
    assert regions(f"{BOX}</think><answer>The image shows a cat.</answer>") == ["think", "answer"]


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_response>The image shows a cat. {BOX}</tool_response>",
        f"<tool_response>The image shows a cat. {BOX}",
        "Zoomed in on the image to the region [226, 399, 265, 464].",
        f"<|im_end|><|im_start|>user\nThe image shows a cat. {BOX}<|im_end|>",
        f"[TOOL_RESPONSE] image_zoom_in_tool {BOX}",
    ],
)
def test_text_of_the_environment_is_cut(text):
    assert parse_anchors(text) == []


def test_text_after_the_environment_counts():
    text = f"<tool_response>{BOX}</tool_response><think>The image shows a cat.</think>"
    assert [a.kind for a in parse_anchors(text)] == ["phrase"]


def test_a_box_written_three_times_counts_once():
    assert len(parse_anchors(BOX * 2)) == 2
    assert len(parse_anchors(BOX * 3)) == 1


@pytest.mark.parametrize(
    ("box", "size", "coordinates", "valid"),
    [
        ("[10, 20, 300, 400]", (320, 410), "absolute", True),
        ("[10, 20, 300, 420]", (320, 410), "absolute", True),  # within 3 % of the height
        ("[10, 20, 300, 430]", (320, 410), "absolute", False),
        ("[-3, 20, 300, 400]", (320, 410), "absolute", True),
        ("[-30, 20, 300, 400]", (320, 410), "absolute", False),
        ("[10, 20, 300, 900]", (320, 410), "relative_1000", True),
        ("[10, 20, 300, 900]", (320, 410), "auto", True),  # may be 0-1000
        ("[10, 20, 1300, 900]", (320, 410), "auto", False),
        ("[10, 20, 1300, 900]", (2000, 1000), "auto", True),
        ("[10, 20, 1300, 900]", None, "auto", True),
        ("[10, 20, 1300, 900]", None, "relative_1000", False),
        ("[0.1, 0.2, 0.3, 0.9]", None, "normalized", True),
        ("[0.1, 0.2, 1.3, 0.9]", None, "normalized", False),
        ("[10, 20, 30, 90.5]", None, "percent", True),
        ("[10, 20, 30, 120]", None, "percent", False),
    ],
)
def test_inside_the_image(box, size, coordinates, valid):
    assert len(parse_anchors(f'{{"bbox_2d": {box}}}', size, coordinates)) == valid


def test_rejections():
    with pytest.raises(ValueError, match="coordinates must be one of .*; got 'pixels'"):
        parse_anchors("", coordinates="pixels")
    for size in ((0, 5), (5,), (5, -1), 5, "ab", (1, 2, 3), (float("nan"), 5), (float("inf"), 5)):
        with pytest.raises(ValueError, match="image_size must be a positive"):
            parse_anchors("", image_size=size)
    with pytest.raises(TypeError, match="text must be a str; got bytes"):
        parse_anchors(b"")


PIECES = st.sampled_from(
    [
        *"[](),;1.- \n{}:'\"=<>",
        "20",
        "300",
        "0.5",
        "bbox_2d",
        "<box>",
        "</box>",
        "<ref>a</ref>",
        "<|box_start|>",
        "<think>",
    ]
    + ["</think>", "<tool_call>", "<tool_response>", "<loc0100>", "<patch_index_0044>", '<point x="1" y="2">', "\u56fe"]
    + ['<points coords="1 1 2 3">', "look at ", "the ", "image", "in ", "shows ", "figure", "of ", "question asks "]
    + ["\u770b", "\u56fe\u7247", "\u4e2d", "\u3002", "\uff0c", "\uff11", "\uff3b", "\u0130", "\u200b"]
)
TEXTS = st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=60).map("".join))


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_any_text(text):
    anchors = parse_anchors(text)
    assert anchors == parse_anchors(text)
    previous = 0
    for anchor in anchors:
        assert previous <= anchor.start < anchor.end <= len(text)
        previous = anchor.start
        assert (anchor.coords is None) == (anchor.kind == "phrase")
        assert anchor.region in ("none", "think", "answer", "rethink", "tool_call")
        if anchor.kind == "point":
            assert len(anchor.coords) == 2
        if anchor.kind == "bbox":
            assert len(anchor.coords) in (2, 4, 8)
        if anchor.coords is not None:
            assert any(c.isdigit() for c in text[anchor.start : anchor.end])


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[st.integers(0, 1000)] * 4), st.text(alphabet="abc \n.", max_size=20))
def test_a_box_is_found_if_and_only_if_it_has_an_area(box, padding):
    text = f'{padding}{{"bbox_2d": {list(box)}, "label": "x"}}{padding}'
    anchors = parse_anchors(text)
    assert len(anchors) == (box[0] < box[2] and box[1] < box[3])
    for anchor in anchors:
        assert text[anchor.start : anchor.end] == str(list(box))
        assert anchor.coords == box
        assert anchor.label == "x"


def test_anchors_can_not_be_changed():
    with pytest.raises(AttributeError):
        Anchor("phrase", 0, 1).start = 2


def seconds_for(text):
    """Of this process's own computing, without the garbage collection of a process full of other tests."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        parse_anchors(text)
        return time.process_time() - start
    finally:
        gc.enable()


def test_deep_nesting_takes_linear_time():
    # looking through the stack at every closing tag would take minutes
    assert seconds_for("<think>" * 40_000 + BOX + "</answer>" * 40_000) < 5


@pytest.mark.e2e
@pytest.mark.parametrize(
    "pattern",
    [
        "[",
        "(1,",
        "[1,2,30,40],",
        "<box>",
        "look at the ",
        "the image of ",
        "1",
        "\u56fe",
        "question asks ",
        "<points x1=",
        "<tool_response></tool_response>",
        "Here is the cropped image ",
        ".",
    ],
)
def test_time_is_linear(pattern):
    def seconds(length):
        return seconds_for((pattern * (length // len(pattern) + 1))[:length])

    small = min(seconds(10_000) for _ in range(3))
    # Quadratic time would be a factor of 100. The floor keeps tiny timings from deciding.
    assert seconds(100_000) < 40 * max(small, 0.002)
