# SPDX-License-Identifier: Apache-2.0
import pytest

from avar_verl.tools.synth.chain import Progress
from avar_verl.tools.synth.config import GATES
from avar_verl.tools.synth.gates import (
    LEAK_ANSWER,
    LEAK_DESCRIPTION,
    Verdict,
    count_words,
    judge,
    language_probability,
    reflections,
)
from avar_verl.tools.synth.store import Call, Failure

GOOD = (
    "In the image, the top left [0, 0, 56, 56] shows a cat that sits on a wooden bench. Next to it, the top right "
    "[56, 0, 112, 56] shows a rocket on its way up. Wait, let me look back at the picture to be sure about the cat: it "
    "has two ears and a tail, so it is one. So the answer is the cat."
)


def progress(reasoning: str, answer: str = "cat") -> Progress:
    chain = f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"
    texts = {"describe": "a cat", "reason": chain, "integrate": chain}
    return Progress({s: Call("k", "i", s, "m", "p", text, "stop", 1, 7, 0.0, 1, 0.0, 0.0) for s, text in texts.items()})


@pytest.fixture
def verdict_of(make_config, grid_item):
    def run(reasoning: str = GOOD, answer: str = "cat", *overrides: str, **changes) -> Verdict:
        item = grid_item(0, answers=("cat",), question="<image>What is this?", **changes)
        return judge(make_config(*overrides), item, progress(reasoning, answer))

    return run


def test_good(verdict_of):
    verdict = verdict_of()
    assert (verdict.failed, verdict.gate) == ({}, "")
    assert verdict.response == f"<think>{GOOD}</think><answer>cat</answer>"
    assert verdict.numbers["anchors_coordinates"] == 2 and verdict.numbers["reflections"] == 1
    assert verdict.numbers["words"] == len(GOOD.split())


def swap(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("gate", "reasoning", "answer"),
    [
        ("answer", GOOD, "rocket"),
        (
            "anchors",
            "A cat sits on a bench. Wait, let me check once more whether it is a cat: two ears and a tail, so it "
            "must be one. Nothing else comes into question here. So the answer is the cat.",
            "cat",
        ),
        ("boxes", swap("[0, 0, 56, 56]", "[30, 30, 90, 90]"), "cat"),
        ("reflection", swap("Wait, let me look back at", "All that stands in"), "cat"),
        ("leak_description", swap("In the image, the", "According to the description, in the image the"), "cat"),
        ("leak_answer", swap("So the answer is the cat", "So this agrees with the given answer"), "cat"),
        ("length", "In the image [0, 0, 56, 56] a cat. Wait, check the picture [56, 0, 112, 56] again: yes.", "cat"),
        (
            "language",
            "Auf dem Bild zeigt das Feld links oben [0, 0, 56, 56] eine Katze, die auf einer Bank sitzt. Rechts dann "
            "[56, 0, 112, 56] steigt eine Rakete auf. Wait, let me look back at the picture: die Katze hat Ohren und "
            "einen Schwanz, also ist es eine. Die Antwort lautet deshalb Katze.",
            "cat",
        ),
    ],
)
def test_each_gate_rejects_what_is_its_own(verdict_of, gate, reasoning, answer):
    verdict = verdict_of(reasoning, answer)
    assert list(verdict.failed) == [gate], verdict.failed
    disabled = verdict_of(reasoning, answer, f"gates.disabled=[{gate}]") if gate != "answer" else None
    assert disabled is None or not disabled.failed


def test_spread(verdict_of):
    filler = "So on it goes with thoughts about nothing in particular, as one does. " * 12
    text = (
        "In the image, the top left [0, 0, 56, 56] shows a cat. Wait, let me look back at the picture [56, 0, 112, 56]."
    )
    verdict = verdict_of(f"{text} {filler}")
    assert verdict.failed == {"anchors": "new references in 1 of 4 parts, 2 are needed"}


def test_too_long(verdict_of):
    assert "words, 20 to 40 are wanted" in verdict_of(GOOD, "cat", "gates.max_words=40").failed["length"]


def test_boxes_are_not_looked_at_without_reference(verdict_of):
    off = swap("[0, 0, 56, 56]", "[30, 30, 90, 90]")
    assert not verdict_of(off, boxes=()).failed
    assert not verdict_of(off, "cat", "gates.min_box_iou=0").failed


def test_boxes_in_thousandths(verdict_of):
    text = GOOD.replace("[0, 0, 56, 56]", "[0, 0, 500, 500]").replace("[56, 0, 112, 56]", "[500, 0, 1000, 500]")
    assert not verdict_of(text, "cat", "output.coordinates=relative_1000").failed


def test_every_failed_gate_is_kept_in_the_order_of_gates(verdict_of):
    verdict = verdict_of("The given answer follows from the description.", "rocket")
    assert list(verdict.failed) == [gate for gate in GATES if gate in verdict.failed]
    assert set(verdict.failed) >= {"answer", "anchors", "reflection", "leak_description", "leak_answer", "length"}
    assert verdict.gate == "answer"


def test_inputs_and_calls(make_config, grid_item):
    config = make_config()
    assert judge(config, grid_item(0, problem="broken"), Progress()).failed == {"input": "broken"}
    failure = Failure("k", "i", "reason", "HTTP 500: no", 6, False)
    assert judge(config, grid_item(0), Progress(failure=failure)).failed == {
        "call": "reason: HTTP 500: no (after 6 attempts)"
    }


@pytest.mark.parametrize("ended", ["refused", "truncated", "format"])
def test_a_stage_of_no_use(make_config, grid_item, ended):
    calls = {"describe": Call("k", "i", "describe", "m", "p", "", "stop", 1, 1, 0.0, 1, 0.0, 0.0)}
    verdict = judge(make_config(), grid_item(0), Progress(calls, ended=ended))
    assert verdict.gate == ended and verdict.failed[ended].startswith("describe: ")


@pytest.mark.parametrize(
    "text",
    [
        "According to the description, it is red.",
        "The description says that it is red.",
        "As described, it is red.",
        "it is mentioned in the text",
        "The provided image description shows it",
        "the caption states 5",
        "根据描述，它是红色的。",
        "描述中提到三个圆。",
    ],
)
def test_description_leaks(text):
    assert LEAK_DESCRIPTION.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "Let me describe the triangle. It is isosceles.",
        "The label under the axis says 5.",
        "A job description is printed on the left.",
        "as shown in the image",
        "the circle described by the point P",
    ],
)
def test_no_description_leaks(text):
    assert not LEAK_DESCRIPTION.search(text)


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("This matches the given answer.", True),
        ("the ground truth is 5", True),
        ("The answer is given as 5", True),
        ("it is known to be the right answer", True),
        ("已知答案是5", True),
        ("So the answer is 5.", False),
        ("The correct option is B.", False),
        ("Given the angle, the answer follows.", False),
    ],
)
def test_answer_leaks(text, leaks):
    assert bool(LEAK_ANSWER.search(text)) == leaks


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A cat. Wait, the second ear is missing in this picture.", 1),
        ("A cat. Let me double-check the sum: 3 + 4 is 7.", 1),
        ("A cat. Looking at the left angle again, it is 30 degrees.", 1),
        ("第一步是五。等等，让我重新检查一下左边的三角形是不是直角。", 1),
        ("A cat. Wait. Let me check. Yes.", 0),  # nothing is checked
        ("Let me check the image first of all, since it matters here. A cat.", 0),  # the first sentence
        ("A cat. The waiter brings the check to the table at noon.", 0),
        ("A cat. Wait, the ear is really missing. A dog. Wait, the ear is really missing.", 1),  # the same words
        ("", 0),
    ],
)
def test_reflections(text, found):
    assert len(reflections(text)) == found


def test_count_words():
    assert count_words("one two  three") == 3 and count_words("四个字呢 and") == 3 and count_words("") == 0


def test_languages():
    english = "The top left of the picture shows a cat, and the top right shows a rocket on its way up."
    assert language_probability(english, ["en"]) > 0.9 > 0.1 > language_probability(english, ["de", "fr"])
    assert language_probability("左上角的图片显示一只猫，右上角显示一枚火箭。", ["zh"]) > 0.5
    with pytest.raises(ValueError, match=r"gates.languages must be ISO 639-1 codes .* got \['klingon'\]"):
        language_probability(english, ["klingon"])
