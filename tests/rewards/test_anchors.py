# SPDX-License-Identifier: Apache-2.0
"""The anchor score: one new reference in each part of the reasoning, by hand."""

import pytest

from avar_verl.rewards.anchors import AnchorScore, anchor_score, reasoning_span

FILLER = "So the next thing to do is to count. " * 3
BOXES = ["[40, 60, 90, 120]", "[300, 60, 390, 120]", "[40, 400, 90, 520]", "[500, 500, 640, 720]"]


def box(index: int) -> str:
    return f'{{"bbox_2d": {BOXES[index]}, "label": "cup"}} '


def reasoning(*parts: str) -> str:
    """Four parts of about the same length, each with something at its beginning."""
    return "<think>" + "".join(part + FILLER for part in parts) + "</think><answer>4</answer>"


@pytest.mark.parametrize(
    "parts, score",
    [
        (("", "", "", ""), 0.0),
        ((box(0), "", "", ""), 1 / 4),
        ((box(0), box(1), "", ""), 2 / 4),
        ((box(0), box(1), box(2), box(3)), 1.0),
        ((box(0), box(0), box(0), box(0)), 1 / 4),  # again and again the same one
        ((box(0) + box(1) + box(2) + box(3), "", "", ""), 1 / 4),  # all at once
        (("In the image there is a cup. ", "", "", ""), 0.5 / 4),
        (("In the image there is a cup. ", box(0), "", ""), 1.5 / 4),
        (("In the image there is a cup. " + box(0), "", "", ""), 1 / 4),  # the best one of a part
        (("I look at the image. ", "I look at the image again. ", "", ""), 0.5 / 4),  # the same words
    ],
)
def test_by_hand(parts, score):
    assert anchor_score(reasoning(*parts), coordinates="absolute").score == pytest.approx(score)


def test_statistics():
    text = reasoning(box(0) + "In the image there is a cup. ", box(0), box(1), "")
    assert anchor_score(text) == AnchorScore(0.5, num_anchors=4, num_distinct=3, num_coordinates=2, parts_covered=2)


def test_phrases_can_be_worth_nothing():
    text = reasoning("In the image there is a cup. ", box(0), "", "")
    assert anchor_score(text, phrase_weight=0.0).score == 0.25
    assert anchor_score(text, phrase_weight=1.0).score == 0.5


@pytest.mark.parametrize("size, coordinates", [((200, 100), "absolute"), ((640, 480), "relative_1000")])
def test_a_box_around_everything_points_at_nothing(size, coordinates):
    width, height = size if coordinates == "absolute" else (1000, 1000)
    whole = f'{{"bbox_2d": [0, 0, {width}, {height}]}} '
    half = f'{{"bbox_2d": [0, 0, {width // 2}, {height}]}} '
    assert anchor_score(reasoning(whole, "", "", ""), size, coordinates).score == 0
    assert anchor_score(reasoning(half, "", "", ""), size, coordinates).score == 0.25


def test_boxes_are_compared_across_formats():
    """The same place in 0-1000 and in percent; and two points, one of them moved by a hundredth."""
    first = '{"bbox_2d": [100, 200, 300, 400]} '
    assert anchor_score(reasoning(first, '<point x="20.0" y="30.0">cup</point> ', "", ""), None, "relative_1000").score
    same = "<|box_start|>(100,200),(300,400)<|box_end|> "
    assert anchor_score(reasoning(first, same, "", ""), None, "relative_1000").num_distinct == 1
    points = '<point x="20.0" y="30.0">cup</point> ', '<point x="21.0" y="30.0">cup</point> '
    assert anchor_score(reasoning(*points, "", "")).num_distinct == 1


@pytest.mark.parametrize(
    "text, span",
    [
        ("<think>abc</think><answer>d</answer>", "abc"),
        ("abc</think><answer>d</answer>", "abc"),
        ("abc<answer>d</answer>", "abc"),
        ("<think>abc", "abc"),
        ("abc so \\boxed{d} def", "abc so "),
        ("<think>abc</think><think>def</think>", "abc"),
        ("x<think>a<think>b</think>", "a<think>b"),
        ("", ""),
    ],
)
def test_reasoning_ends_where_the_answer_begins(text, span):
    start, end = reasoning_span(text)
    assert text[start:end] == span


def test_think_in_the_prompt():
    text = "abc<think>def</think>"
    start, end = reasoning_span(text, think_in_prompt=True)
    assert text[start:end] == "abc<think>def"


def test_sentences_of_the_prompt_are_not_paid_for():
    question = "In the image, how many cups are on the table? Answer with a number."
    echo = reasoning("In the image, how many cups are on the table? ", "", "", "")
    assert anchor_score(echo, prompt=question).num_anchors == 0
    # At the very beginning, right after the tag, and in the middle of a line.
    question = "Look at the picture and answer with a number. How many?"
    for echo in (
        reasoning("Look at the picture and answer with a number. ", "", "", ""),
        reasoning("", question, "", ""),
    ):
        assert anchor_score(echo).num_anchors == 1
        assert anchor_score(echo, prompt=question).num_anchors == 0
    own = reasoning("In the image there are three of them. ", "", "", "")
    assert anchor_score(own, prompt=question).score == 0.125


@pytest.mark.parametrize("settings", [{"num_parts": 0}, {"phrase_weight": -0.1}, {"phrase_weight": 1.5}])
def test_settings_are_validated(settings):
    with pytest.raises(ValueError, match="num_parts must be >= 1 and phrase_weight in"):
        anchor_score("", **settings)


@pytest.mark.parametrize("text", ["", "<think>", "</think>", "<think></think>", "<answer>", "\\boxed"])
def test_nothing_is_worth_nothing(text):
    assert anchor_score(text) == AnchorScore(0.0, 0, 0, 0, 0)
