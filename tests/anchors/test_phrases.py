# SPDX-License-Identifier: Apache-2.0
"""References in words, English and Chinese, and the sentences that only look like them."""

import pytest

from avar_verl.anchors import parse_anchors
from tests.anchors.phrase_sentences import OTHERS, REFERENCES


def phrases(text):
    return [text[a.start : a.end] for a in parse_anchors(text) if a.kind == "phrase"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Let me look at the picture once more.", "look at the picture"),
        ("I should re-examine the diagram carefully.", "re-examine the diagram"),
        ("Zooming in on the top part of the photo helps.", "Zooming in on the top part of the photo"),
        ("On closer inspection of the chart, blue wins.", "inspection of the chart"),
        ("I check this against the image.", "check this against the image"),
        ("The photograph shows a harbour.", "The photograph shows"),
        ("The image does not contain a dog.", "The image does not contain"),
        ("Both pictures depict a bridge.", "Both pictures depict"),
        ("The chart you provided lists five towns.", "The chart you provided lists"),
        ("There is a fork in the picture.", "in the picture"),
        ("A clock hangs at the top of the image.", "the top of the image"),
        ("As shown in Figure 3, it falls.", "As shown in Figure 3"),
        ("According to the map, it lies north.", "According to the map"),
        ("Based on the given screenshot, press save.", "Based on the given screenshot"),
        ("From the graph, the peak is at noon.", "From the graph"),
        ("Given the image, it rains.", "Given the image"),
        ("The left side of the image is dark.", "The left side of the image"),
        ("\u518d\u770b\u4e00\u4e0b\u7167\u7247\uff0c\u6709\u732b\u3002", "\u518d\u770b\u4e00\u4e0b\u7167\u7247"),
        ("\u5982\u56fe\u6240\u793a\uff0cAB=3\u3002", "\u5982\u56fe\u6240\u793a"),
        ("\u7531\u56fe\u53ef\u77e5\uff0c\u7b54\u6848\u662fB\u3002", "\u7531\u56fe\u53ef\u77e5"),
        ("\u56fe\u7247\u663e\u793a\u4e00\u8f86\u8f66\u3002", "\u56fe\u7247\u663e\u793a"),
        ("\u8fd9\u5f20\u7167\u7247\u4e2d\u6709\u72d7\u3002", "\u8fd9\u5f20\u7167\u7247\u4e2d"),
        ("\u6839\u636e\u56fe\u8868\uff0c\u7ea2\u8272\u6700\u591a\u3002", "\u6839\u636e\u56fe\u8868"),
    ],
)
def test_phrase(text, expected):
    assert phrases(text) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "The question asks which animal is in the picture.",
        "The user wants to know what the photo shows.",
        "We are asked to name the tool in the image.",
        "To find the height of the tree in the image, use the scale.",
        "What is the woman in the photo holding?",
        "I can't see the image.",
        "I do not have access to the picture.",
        "Without the diagram this is hard.",
        "No image was provided.",
        "The image is not available.",
        "Let me draw a diagram of the forces.",
        "Imagine the picture of a cat.",
        "I will sketch the graph.",
        "Let me figure out the rest.",
        "A six-figure sum.",
        "His figure is slim.",
        "The sales figures are in millions.",
        "The image of f is [0, 1].",
        "The graph of y = 2x is a line.",
        "The mirror forms a virtual image.",
        "An optical image is sharp.",
        "The big picture matters.",
        "Then I call image_zoom_in_tool.",
        "Looking at the options, B fits.",
        "The plot of the movie is thin.",
        "\u9898\u76ee\u8bf4\u5982\u56fe\u6240\u793a\uff0c\u6c42\u89d2A\u3002",
        "\u51fd\u6570\u56fe\u50cf\u7ecf\u8fc7\u539f\u70b9\u3002",
        "\u753b\u51fa\u56fe\u50cf\u7684\u8349\u56fe\u3002",
        "\u6211\u8bd5\u56fe\u8bc1\u660e\u3002",
        "\u4ed6\u5728\u56fe\u4e66\u9986\u3002",
        "\u6211\u770b\u4e0d\u5230\u56fe\u7247\u3002",
    ],
)
def test_no_phrase(text):
    assert phrases(text) == []


def test_sentences_repeated_three_times_count_once():
    sentence = "I look at the chart again. "
    assert len(phrases(sentence * 2)) == 2
    assert len(phrases(sentence * 3)) == 1
    assert len(phrases(sentence * 3 + "The chart shows rain.")) == 2


def test_a_chain_without_full_stops_counts_once():
    assert len(phrases("look at the image, " * 8)) == 1


def test_different_sentences_are_no_copies():
    assert len(phrases("A cat in the image. A dog in the image. A hen in the image. A cow in the image.")) == 4


def test_sentences_that_the_grammar_was_not_written_from():
    missed = [text for text in REFERENCES if not phrases(text)]
    assert missed == [
        "The bar chart plots sales by year.",
        "\u8fd9\u5f20\u5730\u56fe\u6807\u51fa\u4e86\u4e09\u6761\u6cb3\u6d41\u3002",
    ]
    assert [text for text in OTHERS if phrases(text)] == []
