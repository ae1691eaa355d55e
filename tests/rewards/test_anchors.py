# SPDX-License-Identifier: Apache-2.0
"""The anchor score: new references in different parts of the reasoning, by hand."""

import pytest

from avar_verl.rewards.anchors import AnchorScore, anchor_score, reasoning_span

# Four parts of about the same length; each says something of its own.
SAYS = (
    "A lemon is next to the knife, and bread crumbs cover the wooden board. So this is one more to count. ",
    "A green towel hangs from an iron hook above the sink near plates. So the last one is here to count. ",
    "A white cup stands beside the kettle, its handle turned towards the stove. So that is one to count. ",
    "A glass jar with spoons hides half of a blue bowl on the shelf. So here is the next one to count. ",
)
FILLER = "So the next thing to do is to count. " * 3
BOXES = ["[40, 60, 90, 120]", "[300, 60, 390, 120]", "[40, 400, 90, 520]", "[500, 500, 640, 720]"]


def box(index: int) -> str:
    return f'{{"bbox_2d": {BOXES[index]}, "label": "cup"}} '


def reasoning(*parts: str) -> str:
    """Each part with something at its beginning."""
    return (
        "<think>" + "".join(part + says for part, says in zip(parts, SAYS, strict=True)) + "</think><answer>4</answer>"
    )


def filled(*parts: str) -> str:
    """The same with stock sentences, which say nothing."""
    return "<think>" + "".join(part + FILLER for part in parts) + "</think><answer>4</answer>"


@pytest.mark.parametrize(
    "parts, score",
    [
        (("", "", "", ""), 0.0),
        ((box(0), "", "", ""), 2 / 3),
        ((box(0), box(1), "", ""), 1.0),
        ((box(0), box(1), box(2), box(3)), 1.0),
        ((box(0), box(0), box(0), box(0)), 2 / 3),  # again and again the same one
        ((box(0) + box(1) + box(2) + box(3), "", "", ""), 2 / 3),  # all at once
        (("In the image there is a cup. ", "", "", ""), 1 / 3),
        (("In the image there is a cup. ", box(0), "", ""), 1.0),
        (("In the image there is a cup. " + box(0), "", "", ""), 2 / 3),  # the best one of a part
        (("I look at the image. ", "I look at the image again. ", "", ""), 1 / 3),  # the same words
    ],
)
def test_by_hand(parts, score):
    assert anchor_score(reasoning(*parts), coordinates="absolute").score == pytest.approx(score)


@pytest.mark.parametrize(
    "parts, score",
    [
        ((box(0), "", "", ""), 2 / 3),  # one box and one phrase need no words of their own
        (("In the image there is a cup. ", box(0), "", ""), 1.0),
        ((box(0), box(1), box(2), box(3)), 2 / 3),
        (("I look at the image. ", "I see in the photo: ", "The chart shows ", "In the map "), 1.0),
        ((box(0), "I see in the photo: ", "The chart shows ", "In the map "), 1.0),
        ((box(0), "I see: lemon, knife, towel ", box(1), ""), 2 / 3),  # words before stock sentences
        ((box(0), "", "A lemon and a knife next to the towel: " + box(1), ""), 1.0),
        ((box(0), "", "A lemon and a knife next to the towel: " + box(1), "A lemon and a knife: " + box(2)), 1.0),
        ((box(0), "", "Lemon, knife, towel: " + box(1), ""), 2 / 3),  # a list of names is no prose
        (
            (box(0), "", "Here is the lemon " + box(1) + "and the knife " + box(2) + "and the towel " + box(3), ""),
            2 / 3,
        ),
    ],
)
def test_words_of_its_own(parts, score):
    assert anchor_score(filled(*parts), coordinates="absolute").score == pytest.approx(score)


def test_words_of_the_question_are_not_its_own():
    text = filled(box(0), "", "A lemon and a knife next to the towel: " + box(1), "")
    assert anchor_score(text, prompt="Is there a towel?").score == pytest.approx(2 / 3)
    assert anchor_score(text, prompt="Is there a spoon?").score == 1.0


def test_labels_are_not_its_own_words():
    labelled = '{"bbox_2d": [300, 60, 390, 120], "label": "a lemon and a knife next to the towel"} '
    tagged = "<ref>a lemon and a knife next to the towel</ref><box>(300,60),(390,120)</box> "
    for second in (labelled, labelled.replace('"', "'"), tagged):
        assert anchor_score(filled(box(0), "", second, ""), coordinates="absolute").score == pytest.approx(2 / 3)


def test_chinese_words_of_its_own():
    text = "\u684c\u5b50\u4e0a\u653e\u7740\u84dd\u8272\u8336\u58f6\u548c\u67e0\u6aac\uff1a"  # a blue teapot and a lemon
    assert anchor_score(filled(box(0), "", text + box(1), ""), coordinates="absolute").score == 1.0
    stock = "\u63a5\u4e0b\u6765\u4ed4\u7ec6\u68c0\u67e5\uff1a"  # next, check carefully
    assert anchor_score(filled(box(0), "", stock + box(1), ""), coordinates="absolute").score == pytest.approx(2 / 3)


@pytest.mark.parametrize("separator", ["\n", " --- ", " | ", " 1 2 3 ", "\u3002", " xkcd ", " aaa "])
def test_separators_are_no_prose(separator):
    text = "<think>" + "".join(separator * 9 + box(i) for i in range(4)) + separator * 9 + "</think><answer>4</answer>"
    assert anchor_score(text, coordinates="absolute").score == 0


def test_a_long_list_pays_less_than_one_reference():
    boxes = [
        f'{{"bbox_2d": [{30 * (i % 10)}, {30 * (i // 10)}, {30 * (i % 10) + 20}, {30 * (i // 10) + 20}]}} '
        for i in range(100)
    ]
    spread = ["".join(boxes[i : i + 25]) for i in range(0, 100, 25)]
    # 32 places are no list. Of a hundred, stock sentences read one box of 1.5, and other sentences enough.
    assert anchor_score(filled("".join(boxes[:32]), "", "", "")).score == pytest.approx(2 / 3)
    for text in (filled("".join(boxes), "", "", ""), filled(*spread)):
        assert anchor_score(text, coordinates="absolute").score == pytest.approx(2 / 3 * 32 / 100)
    assert anchor_score(reasoning(*spread), coordinates="absolute").score == pytest.approx(32 / 100)


MADE_UP = ("thidog perspe brenta ", "anoth tolima straightfo ", "blorf vimmel kadro ", "necessar ovel zintra ")


def test_words_that_are_none_win_nothing():
    """A box and a phrase in stock sentences earn the whole score: words cut off or made up add nothing to it."""
    plain = filled("In the image there is a cup. ", box(0), "", "")
    assert anchor_score(plain, coordinates="absolute").score == 1.0
    made_up = filled(*(f"So here is the {words} of it at " + box(i) for i, words in enumerate(MADE_UP)))
    result = anchor_score(made_up, coordinates="absolute")
    assert result.num_read == 4 and result.score == 1.0


def test_the_one_box_that_needs_no_words_is_not_where_the_phrase_is():
    text = filled("In the image there is a cup. " + box(0), "", box(1), "")
    assert anchor_score(text, coordinates="absolute").score == 1.0


def test_statistics():
    text = reasoning(box(0) + "In the image there is a cup. ", box(0), box(1), "")
    assert anchor_score(text) == AnchorScore(1.0, 4, num_distinct=3, num_coordinates=2, parts_covered=2, num_read=2)


def test_phrases_can_be_worth_nothing():
    text = reasoning("In the image there is a cup. ", box(0), "", "")
    assert anchor_score(text, phrase_weight=0.0).score == pytest.approx(2 / 3)
    assert anchor_score(text, phrase_weight=0.25).score == pytest.approx(1.25 / 1.5)
    assert anchor_score(text, phrase_weight=1.0).score == 1.0


@pytest.mark.parametrize("size, coordinates", [((200, 100), "absolute"), ((640, 480), "relative_1000")])
def test_a_box_around_everything_points_at_nothing(size, coordinates):
    width, height = size if coordinates == "absolute" else (1000, 1000)
    whole = f'{{"bbox_2d": [0, 0, {width}, {height}]}} '
    half = f'{{"bbox_2d": [0, 0, {width // 2}, {height}]}} '
    assert anchor_score(reasoning(whole, "", "", ""), size, coordinates).score == 0
    assert anchor_score(reasoning(half, "", "", ""), size, coordinates).score == pytest.approx(2 / 3)


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
    assert anchor_score(own, prompt=question).score == pytest.approx(1 / 3)


def test_one_part_is_covered_by_one_box():
    text = reasoning("", box(0), "", "In the image there is a cup. ")
    assert anchor_score(text, num_parts=1).score == 1.0 and anchor_score(text, num_parts=2).score == 1.0
    assert anchor_score(reasoning(box(0), "", "", ""), num_parts=2).score == pytest.approx(2 / 3)


@pytest.mark.parametrize("settings", [{"num_parts": 0}, {"phrase_weight": -0.1}, {"phrase_weight": 1.5}])
def test_settings_are_validated(settings):
    with pytest.raises(ValueError, match="num_parts must be >= 1 and phrase_weight in"):
        anchor_score("", **settings)


@pytest.mark.parametrize("text", ["", "<think>", "</think>", "<think></think>", "<answer>", "\\boxed"])
def test_nothing_is_worth_nothing(text):
    assert anchor_score(text) == AnchorScore(0.0, 0, 0, 0, 0, 0)
