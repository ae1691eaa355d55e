# SPDX-License-Identifier: Apache-2.0
"""Answers of responses, graded by the reward's grader (`avar_verl.rewards.accuracy`)."""

from collections.abc import Sequence

from avar_verl.rewards.accuracy import Decimals, extract_answer, grade_answer

ANSWER_RULES = ("reward", "whole")


def find_answer(response: str, rule: str = "reward") -> str | None:
    """The answer of a response: `extract_answer`, the reward's rule.

    With rule "whole", a response without any of its marks (`<think>`, `<answer>`, their ends, `\\boxed`, `\\fbox`) is
    the answer as a whole: for models that were not trained to mark it and answer only "B".
    """
    if rule not in ANSWER_RULES:
        raise ValueError(f"the answer rule must be one of {ANSWER_RULES}; got {rule!r}. See docs/eval.md.")
    found = extract_answer(response)
    marks = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed", "\\fbox")
    if found is None and rule == "whole" and not any(mark in response for mark in marks):
        return response.strip() or None
    return found


def is_correct(
    answer: str | None, ground_truth: Sequence[str], options: Sequence[str] = (), decimals: Decimals = "exact"
) -> bool:
    """Whether an answer is accepted (`grade_answer`); a missing answer is wrong."""
    return answer is not None and grade_answer(answer, list(ground_truth), options, decimals)
