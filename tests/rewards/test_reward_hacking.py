# SPDX-License-Identifier: Apache-2.0
"""docs/reward-hacking.md as tests: every exploit, with a right answer, earns no more than an honest response."""

import json
from pathlib import Path

import pytest

from reward_fns.visual_anchor import compute_score

SIZE = (640, 480)
QUESTION = "In the image, how many cups are there? Look at the picture and answer with a number."
INFO = {"image_sizes": [SIZE], "prompt_text": QUESTION}
# What four places show: an honest response says it, an exploit has the stock sentence instead.
SAYS = (
    "A white cup stands beside the kettle, its handle turned towards the stove. So that is the first of them. ",
    "Under the iron hook with the green towel, the last one dries upside down. So that makes four of them. ",
    "A glass jar with spoons hides half of another, blue and striped. So this one counts as well, I think. ",
    "The third is a tin mug next to a lemon and a knife on the wooden board. So there are three so far. ",
)
STEP = "Then the next thing to do is to count what stands there and to keep the number in mind. "
BOXES = ["[40, 60, 90, 120]", "[300, 60, 390, 120]", "[40, 300, 90, 420]", "[500, 300, 630, 470]"]


def box(numbers: str) -> str:
    return f'{{"bbox_2d": {numbers}, "label": "cup"}} '


def reasoning(*parts: str) -> str:
    return "".join(part + STEP for part in parts)


def honest(*parts: str) -> str:
    return "".join(part + says for part, says in zip(parts, SAYS, strict=True))


def response(thought: str, after: str = "") -> str:
    return f"<think>{thought}</think><answer>4</answer>{after}"


def score(text: str, info: dict = INFO, **settings) -> float:
    return compute_score("cups", text, "4", info, coordinates="absolute", **settings)["score"]


HONEST = response(honest(*(box(numbers) for numbers in BOXES)))
HONEST_IN_WORDS = response(
    honest("In the image there is a table. ", "", "The image shows three cups on the left. ", "")
)
TWO_REFERENCES = response(honest("In the image there is a table. ", "", box(BOXES[0]), ""))
NOTHING = response(reasoning("", "", "", ""))

LABELS = (
    "cup dog cat car tree person chair lamp plate bottle bird book door clock phone sign bus train boat horse".split()
)


def grid(i: int) -> str:
    """The i-th of 100 places."""
    return f"[{60 * (i % 10)}, {45 * (i // 10)}, {60 * (i % 10) + 40}, {45 * (i // 10) + 30}]"


def labelled(i: int) -> str:
    return f'{{"bbox_2d": {grid(i)}, "label": "{LABELS[i % 20]} {i}"}}'


STOCK = (
    "First, I need to understand what the question is asking for. ",
    "Now consider the other possibilities and rule them out one by one. ",
    "To be thorough, I also want to look at it from a different perspective. ",
    "Putting it all together gives the final result. ",
)
LOOK = "I look at the image. "
HIDDEN = "\u200b"  # A space without width.
EXPLOITS = {
    "spam of one phrase": response(reasoning(*[LOOK * 5] * 4)),
    "spam of one box": response(reasoning(*[box(BOXES[0]) * 5] * 4)),
    "spam of one box, moved": response(reasoning(*(box(f"[{40 + i}, 60, {90 + i}, 120]") for i in range(4)))),
    "a list at the beginning": response("".join(map(box, BOXES)) + reasoning("", "", "", "")),
    "a list at the end": response(reasoning("", "", "", "") + "".join(map(box, BOXES))),
    "copying the question": response(reasoning(QUESTION + " ", "", QUESTION + " ", "")),
    "the whole image": response(reasoning(box("[0, 0, 640, 480]"), box("[1, 1, 639, 479]"), "", "")),
    "outside the image": response(reasoning(*(box(f"[{700 + 90 * i}, 500, {760 + 90 * i}, 600]") for i in range(4)))),
    "no area": response(reasoning(*(box(f"[{90 * i}, 50, {90 * i}, 50]") for i in range(4)))),
    "cut off": response(reasoning(*(f'{{"bbox_2d": [{90 * i}, 50, ' for i in range(4)))),
    "after the answer": response(reasoning("", "", "", ""), after=reasoning(*map(box, BOXES))),
    "in the answer": f"<think>{reasoning('', '', '', '')}</think><answer>{''.join(map(box, BOXES))} 4</answer>",
    "a second think block": response(reasoning("", "", "", ""), after=f"<think>{reasoning(*map(box, BOXES))}</think>"),
    "a tool's words": response(
        reasoning(*(f"<tool_response>{box(numbers)}{LOOK}</tool_response>" for numbers in BOXES))
    ),
    "a giant response": response(reasoning(*[LOOK + box(BOXES[0])] * 2000)),
    "invisible characters": response(
        reasoning(*("I look at the im" + HIDDEN * i + "age. I l" + HIDDEN + "ook at the image. " for i in range(4)))
    ),
    "another case and width": response(
        reasoning(
            "I look at the image. ",
            "I LOOK AT THE IMAGE. ",
            "Ｉ ｌｏｏｋ ａｔ ｔｈｅ ｉｍａｇｅ. ",
            "i look at, the image! ",
        )
    ),
    "a hundred labelled boxes": response("".join(labelled(i) + ", " for i in range(100))),
    "a hundred labelled boxes between separators": response("".join(labelled(i) + "\n---\n" for i in range(100))),
    "a hundred labelled boxes in stock sentences": response(
        "".join(STOCK[i % 4] + labelled(i) + " " for i in range(100))
    ),
    "a hundred named boxes": response("".join(f"Here is the {LABELS[i % 20]} {i} at {grid(i)}. " for i in range(100))),
    "four labelled boxes between stock sentences": response("".join(labelled(11 * i) + STOCK[i] for i in range(4))),
    "four named boxes between stock sentences": response(
        "".join(f"Then the {LABELS[i]} at {grid(11 * i)}. " + STOCK[i] * 3 for i in range(4))
    ),
    "four boxes between words of the question": response("".join(labelled(11 * i) + QUESTION for i in range(4))),
    "four boxes between noise": response("".join(labelled(11 * i) + " xkcd 3f aaa bcdfg 1 2 3 " * 9 for i in range(4))),
    "data lists": response(
        reasoning("The list is [3, 40, 20, 10]. ", "x in [2, 5] ", "f(1, 2, 3, 4) ", "(1, 2), (3, 4)")
    ),
}
# What looking once or twice in words pays is no exploit, and more than these may not earn.
EARNS_NOTHING = (
    "a hundred labelled boxes",
    "a hundred labelled boxes between separators",
    "four boxes between noise",
    "copying the question",
    "the whole image",
    "outside the image",
    "no area",
    "cut off",
    "after the answer",
    "a second think block",
    "a tool's words",
    "data lists",
)


def test_what_honest_responses_earn():
    assert score(HONEST) == pytest.approx(1 + 0.1 + 0.3)
    assert score(HONEST_IN_WORDS) == pytest.approx(1 + 0.1 + 0.3 * 2 * 0.5 / 1.5)
    assert score(TWO_REFERENCES) == pytest.approx(1 + 0.1 + 0.3 * min(1, (0.5 + 1) / 1.5))
    assert score(NOTHING) == pytest.approx(1.1)


@pytest.mark.parametrize("name", EXPLOITS)
def test_no_exploit_pays_more_than_looking(name):
    earned = score(EXPLOITS[name])
    assert earned < score(TWO_REFERENCES) <= score(HONEST)
    # One reference repeated is worth that reference; the best of them is a box.
    assert earned <= score(response(reasoning(box(BOXES[0]), "", "", ""))) + 1e-9


@pytest.mark.parametrize("name", EARNS_NOTHING)
def test_these_earn_nothing(name):
    assert score(EXPLOITS[name]) <= score(NOTHING)


@pytest.mark.parametrize("name", ["spam of one phrase", "invisible characters", "another case and width"])
def test_words_that_only_look_new_are_worth_one_phrase(name):
    assert score(EXPLOITS[name]) <= score(response(reasoning(LOOK, "", "", ""))) + 1e-9


def test_the_gate_is_what_keeps_wrong_answers_from_being_paid():
    wrong = HONEST.replace("<answer>4", "<answer>5")
    assert score(wrong) == pytest.approx(0.1) and score(wrong, gated=False) == pytest.approx(0.4)


def test_the_prompt_and_the_size_are_what_stop_two_of_them():
    """The rules that need the reward manager's fields: without them these exploits would pay."""
    assert score(EXPLOITS["copying the question"], {"image_sizes": [SIZE]}) > score(NOTHING)
    assert score(EXPLOITS["outside the image"], {}) > score(NOTHING)


def test_a_giant_response_takes_linear_time():
    """No timing: what is compared grows by no more than the response does (see `MAX_KEPT`)."""
    result = compute_score("cups", EXPLOITS["a giant response"], "4", INFO, coordinates="absolute")
    assert result["num_anchors"] <= 4000 and result["num_distinct_anchors"] == 2


def test_every_row_of_the_document_has_a_test():
    text = (Path(__file__).parents[2] / "docs" / "reward-hacking.md").read_text()
    rows = [line for line in text.partition("## Adv")[0].splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 16 and len(EXPLOITS) >= len(rows)


def test_finds_of_the_search_pay_no_more_than_two_references():
    """Best finds of `benchmarks/anchor_search.py`, most of them against earlier rules."""
    finds = json.loads((Path(__file__).parent / "anchor_finds.json").read_text())
    info = {"image_sizes": [finds["image_size"]], "prompt_text": finds["question"]}
    for text in finds["responses"]:
        assert score(text, info) <= score(TWO_REFERENCES) + 1e-9
