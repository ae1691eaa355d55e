# SPDX-License-Identifier: Apache-2.0
"""Grades answers with the reward's grader (`avar_verl.rewards.accuracy`).

Multiple choice with known option texts: the right letter is accepted ("B", "(B)", "B. 12 cm"), and so is only the text
of the right option, unless it is ambiguous: a text that is itself an option letter (a point named C), or one that the
grader considers equal to another option's (1/2 and 0.5).
"""

from collections.abc import Sequence

from avar_verl.rewards.accuracy import extract_answer, grade_answer

LETTERS = "ABCDEFGHIJ"
ANSWER_RULES = ("reward", "whole")


def check_letter(letter: str, options: Sequence[str]) -> int:
    """Index of the option that `letter` names.

    Raises:
        ValueError: more than ten options, or a letter that is none of them.
    """
    if len(options) > len(LETTERS):
        raise ValueError(f"a question may have {len(LETTERS)} options; got {len(options)}. Leave it out.")
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise ValueError(
            f"an answer must be the letter of one of {len(options)} options; got {letter!r}. Correct the row or "
            "leave it out."
        )
    return LETTERS.index(letter)


def text_is_answer(letter: str, options: Sequence[str]) -> bool:
    """Whether the text of the option that `letter` names identifies it uniquely.

    Example:
        >>> text_is_answer("B", ["11 cm", "12 cm"]), text_is_answer("A", ["C", "D", "E"])
        (True, False)
    """
    right = check_letter(letter, options)
    text = options[right].strip()
    if not text or any(grade_answer(text, known) for known in LETTERS[: len(options)]):
        return False
    others = (option for number, option in enumerate(options) if number != right and option.strip())
    return not any(grade_answer(text, other) for other in others)


def find_answer(response: str, rule: str = "reward") -> str | None:
    """The answer of a response: `extract_answer`, the reward's rule.

    With rule "whole", a response without any of its marks (`<think>`, `<answer>`, their ends, `\\boxed`) is the answer
    as a whole: for models that were not trained to mark it and answer only "B".
    """
    if rule not in ANSWER_RULES:
        raise ValueError(f"the answer rule must be one of {ANSWER_RULES}; got {rule!r}. See docs/eval.md.")
    found = extract_answer(response)
    marks = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed")
    if found is None and rule == "whole" and not any(mark in response for mark in marks):
        return response.strip() or None
    return found


def is_correct(answer: str | None, ground_truth: Sequence[str], options: Sequence[str] = ()) -> bool:
    """Whether an answer is accepted; a missing answer is wrong.

    With `options`, the ground truth is the letter of one of them, and its text is accepted if `text_is_answer`.

    Raises:
        ValueError: `options` with a ground truth that is not one of their letters.
    """
    if answer is None:
        return False
    if grade_answer(answer, list(ground_truth)):
        return True
    if not options:
        return False
    (letter,) = ground_truth
    right = check_letter(letter, options)
    return grade_answer(answer, options[right]) and text_is_answer(letter, options) if options[right].strip() else False
