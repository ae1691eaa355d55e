# SPDX-License-Identifier: Apache-2.0
"""A table of responses, and options by letter or by text."""

import pytest

from avar_verl.tools.grade import find_answer, is_correct

OPTIONS = ("11 cm", "12 cm", "13 cm", "twice the radius")


@pytest.mark.parametrize(
    ("response", "truth", "options", "right"),
    [
        ("<think>see the cat</think><answer>cat</answer>", ("cat",), (), True),
        ("<think>see</think><answer>The cat.</answer>", ("cat",), (), True),
        ("<answer>dog</answer>", ("cat",), (), False),
        (r"so \boxed{\frac{1}{2}}", ("0.5",), (), True),
        ("cat", ("cat",), (), False),  # No mark: the reward finds no answer either.
        ("<think><answer>cat</answer>", ("cat",), (), False),
        ("<answer>eight</answer>", ("8", "eight"), (), True),
        ("<answer>Yes</answer>", ("yes",), (), True),
        ("<answer>B</answer>", ("B",), OPTIONS, True),
        ("<answer>(b)</answer>", ("B",), OPTIONS, True),
        ("<answer>B. 12 cm</answer>", ("B",), OPTIONS, True),
        ("<answer>12 cm</answer>", ("B",), OPTIONS, True),
        ("<answer>Twice the radius.</answer>", ("D",), OPTIONS, True),
        ("<answer>13 cm</answer>", ("B",), OPTIONS, False),
        ("<answer>C</answer>", ("B",), OPTIONS, False),
        ("<answer>12 cm</answer>", ("B",), (), False),  # Options that are in the image or the text are not known.
        ("<answer>B</answer>", ("A",), ("B", "C", "A"), False),  # Points: a letter is the option, never its text.
        ("<answer>A</answer>", ("A",), ("B", "C", "A"), True),
        ("<answer>0.5</answer>", ("A",), ("1/2", "0.5"), False),  # The text of either.
        ("<answer>1/2</answer>", ("A",), ("1/2", "0.5"), False),
        ("<answer>A</answer>", ("A",), ("1/2", "0.5"), True),
        ("<answer>x</answer>", ("A",), ("", "y"), False),
    ],
)
def test_grading(response, truth, options, right):
    assert is_correct(find_answer(response), truth, options) is right


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("B", "B"),
        ("  \n", None),
        ("The cat.", "The cat."),
        ("<think>B", None),  # Cut off while reasoning.
        ("<think>B</think>", None),
        ("<think>x</think><answer>B</answer>", "B"),
        (r"so \boxed{3", None),
    ],
)
def test_a_response_without_marks_as_a_whole(response, found):
    assert find_answer(response, "whole") == found


def test_refusals():
    with pytest.raises(ValueError, match="answer rule must be one of"):
        find_answer("x", "other")
    with pytest.raises(ValueError, match="letter of one of 2 options; got 'C'"):
        is_correct("A", ("C",), ("x", "y"))
