# SPDX-License-Identifier: Apache-2.0
"""Hand-made cases for `avar_verl.rewards.accuracy`, each with its reason, and its guards against hard input."""

import doctest
import logging
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

from avar_verl.rewards import accuracy, expressions
from avar_verl.rewards.accuracy import accepted_answers, extract_answer, grade_answer, sample_name

EXTRACT = [
    ("<think>a</think><answer>5</answer>", "5", "the plain layout"),
    ("<think>a\nb</think>\n<answer>\n\\frac{1}{2}\n</answer>\n", "\\frac{1}{2}", "tags on lines of their own"),
    ("<think>a</think><answer>line 1\nline 2</answer>", "line 1\nline 2", "an answer of two lines"),
    ("a</think><answer>5</answer>", "5", "the prompt ended with <think>"),
    ("<answer>5</answer>", "5", "no reasoning at all"),
    ("It is <answer> 5 </answer>, I think.", "5", "text around the tag is the format reward's business"),
    ("<think>a</think><answer>5</answer><answer>6</answer>", "6", "the last complete answer"),
    ("<think>a</think><answer>5</answer><answer>6", "5", "the last answer is not complete"),
    ("<think>a</think><answer>5</answer> 6</answer>", "5", "a stray closing tag"),
    ("<think>a</think><answer>a<answer>5</answer></answer>", "5", "nested tags: the innermost"),
    ("<think><answer>4</answer></think><answer>5</answer>", "5", "an answer inside the reasoning does not count"),
    ("<think>a</think><answer>So \\boxed{5}</answer>", "5", "a box inside the tag"),
    ("<think>a</think><answer>\\boxed{4} or \\boxed{5}</answer>", "5", "the last box"),
    ("<think>a</think><answer>\\boxed{\\frac{1}{\\sqrt{2}}}</answer>", "\\frac{1}{\\sqrt{2}}", "nested braces"),
    ("<think>a</think><answer>\\boxed{\\boxed{5}}</answer>", "5", "a box in a box"),
    ("<think>a</think><answer>\\boxed {\\{1, 2\\}}</answer>", "\\{1, 2\\}", "escaped braces are no braces"),
    ("<think>a</think><answer>\\boxed{[1, 2\\}}</answer>", "[1, 2\\}", "one escaped brace leaves the count balanced"),
    ("<think>a</think><answer>\\boxed{5</answer>", "\\boxed{5", "an unbalanced box is plain text"),
    ("<think>\\boxed{4}</think>So \\boxed{5}.", "5", "no answer tag: the last box outside the reasoning"),
    ("<think>a</think>{ \\boxed{5} and \\boxed{6", "5", "an open brace before it, an unbalanced box after it"),
    ("So \\boxed{\n5\n}", "5", "neither tags nor reasoning, over lines"),
    ("<think>a</think><answer>5", None, "truncated answer"),
    ("<think>a</think>5</answer>", None, "the opening tag is missing"),
    ("<think>a</think>\\boxed{4}<answer>5", None, "a box does not stand in for a truncated answer"),
    ("<think>a <answer>5</answer>", None, "truncated reasoning"),
    ("<think>\\boxed{5}</think>", None, "a box inside the reasoning only"),
    ("<think><answer>5</answer></think>", None, "an answer inside the reasoning only"),
    ("<answer>5</answer><think>a</think>", None, "an answer before the reasoning"),
    ("<think>a</think><answer> \n </answer>", None, "a blank answer"),
    ("<think>a</think><answer>\\boxed{ }</answer>", None, "an empty box"),
    ("<think>a</think>It is 5.", None, "neither tag nor box"),
    ("\\boxed{5", None, "truncated box"),
    ("<Answer>5</Answer>", None, "tags are case-sensitive"),
    ("", None, "empty response"),
]


@pytest.mark.parametrize("text, expected, reason", EXTRACT)
def test_extract_answer(text, expected, reason):
    assert extract_answer(text) == expected, reason


@pytest.mark.parametrize("text", [None, 5, b"<answer>5</answer>", ["<answer>5</answer>"]])
def test_extract_answer_rejects_what_is_no_string(text):
    with pytest.raises(TypeError, match="text must be a str; got "):
        extract_answer(text)


RIGHT = [
    # Numbers
    ("5", 5, "an int"),
    ("5.0", "5", "a decimal for an integer"),
    ("5.", "5", "a trailing full stop"),
    ("-3", "\u22123", "the mathematical minus"),
    ("1/2", "\\frac{1}{2}", "a slash for a fraction"),
    ("\\dfrac12", 0.5, "a fraction without braces, a float"),
    ("0.333333", "1/3", "six decimal places"),
    ("1e-05", "0.00001", "scientific notation"),
    ("0.00001", 1e-05, "a float that Python writes with an exponent"),
    ("10^{16}", 1e16, "a float that Python writes with a signed exponent"),
    ("3\u00d710^{2}", "300", "the multiplication sign"),
    ("2 1/2", "2.5", "a mixed number"),
    ("3\u00bd", "3.5", "a mixed number with a vulgar fraction, which is not 31/2"),
    ("5\u00b2", "25", "a superscript, which is not 52"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", "nested braces, equal by simplification"),
    ("2\u221a3", "2\\sqrt{3}", "the root sign"),
    ("2\u03c0", "2\\pi", "a Greek letter"),
    ("sqrt(2)", "\\sqrt{2}", "a function without backslash"),
    # Thousands separators
    ("1,234", "1234", "a comma before three digits"),
    ("1,234,567.5", "1234567.5", "several commas and a decimal point"),
    ("10 000", "10000", "spaces"),
    ("1\\,234", "1234", "a LaTeX space"),
    ("1{,}234", "1234", "a comma in braces"),
    ("1\uff0c234", "1234", "the full-width comma"),
    ("x = 1,234", "1234", "after an equals sign"),
    # Percentages
    ("50%", "50", "the number of per cent"),
    ("50\\%", "0.5", "the fraction"),
    ("0.4", "40%", "the percentage on the other side"),
    ("12.5 percent", "12.5%", "in words"),
    # Units
    ("30 cm", "30", "a unit on one side"),
    ("12", "12\\text{ cm}", "a unit in the ground truth"),
    ("24\\,\\mathrm{cm}^{2}", "24 square centimeters", "two ways to write one unit"),
    ("50\u00b0", "50", "degrees"),
    ("50\u00ba", "50^\\circ", "the ordinal sign for a degree"),
    ("2 m", "2m", "a product of a number and a variable"),
    ("2m", "2", "a unit at its number"),
    # Sets, lists, intervals, points
    ("\\{2, 1\\}", "\\{1, 2\\}", "a set has no order"),
    ("2, 1", "1, 2", "nor has a bare list"),
    ("1\u30012", "1 \\text{ or } 2", "the ideographic comma"),
    ("\\pm 2", "2, -2", "plus or minus"),
    ("(1,2]", "(1, 2]", "a half-open interval"),
    ("(1, 2)", "\\left(1,2\\right)", "a point or an open interval"),
    ("x < 2", "(-\\infty, 2)", "an inequality for an interval"),
    ("(3,4)\u222a(1,2)", "(1,2)\\cup(3,4)", "a union"),
    ("{1,2}", "\\{1,2\\}", "braces without backslash"),
    # Equations and expressions
    ("x = 5", "5", "the right-hand side"),
    ("5", "x = 5", "an assignment in the ground truth"),
    ("\\angle ABC = 50^\\circ", "50", "a left-hand side that is no math for math-verify"),
    ("Area = 24 cm^2", "24", "a left-hand side in words"),
    ("5 > x", "x < 5", "an inequality, flipped"),
    ("3x^2+4y^2=12", "\\frac{x^2}{4}+\\frac{y^2}{3}=1", "an equation, multiplied"),
    ("(x+1)^2", "x^2+2x+1", "an expansion"),
    ("\\begin{bmatrix}1\\\\2\\end{bmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "a matrix"),
    # Dressing
    ("$5$", "5", "dollars"),
    ("\\(5\\)", "5", "LaTeX inline math"),
    ("\\[\n5\n\\]", "5", "LaTeX display math over lines"),
    ("\\boxed{5}", "5", "a box"),
    ("**5**", "5", "Markdown"),
    ("The final answer is: 5.", "5", "a lead-in"),
    # Text
    ("Yes", "yes", "case"),
    ("\\text{yes}.", "Yes", "a LaTeX text command and a full stop"),
    ("a  red\ncar", "Red car", "white space and an article"),
    ("\uff39\uff45\uff53", "yes", "full-width letters"),
    ("\u7ea2\u8272\u3002", "\u7ea2\u8272", "Chinese with its full stop"),
    ("AB", "ab", "letters only"),
    ("nan", "nan", "a word that Python reads as a number"),
    # Choices
    ("(B)", "B", "a letter in brackets"),
    ("B.", "B", "with a full stop"),
    ("b)", "(B)", "with one bracket"),
    ("\uff08B\uff09", "B", "full-width brackets"),
    ("B\u3002", "B", "ideographic full stop"),
    ("\\textbf{(C)}", "C", "in bold"),
    ("option C", "C", "with its name"),
    ("B. 12 cm", "B", "with the option's text"),
    ("B", "(B) 12 cm", "with the option's text in the ground truth"),
    ("(B) 12 cm", "B. 12 cm", "twice with the same text"),
    # Several accepted answers
    ("twelve", ["12", "twelve"], "any of a list"),
    ("12", np.array(["12", "twelve"], dtype=object), "any of an array, as parquet gives it"),
    ("12", (11, 12), "any of a tuple of numbers"),
    ("12", np.int64(12), "a NumPy number"),
    ("0.5", Fraction(1, 2), "a rational number"),
]

WRONG = [
    ("", "5", "empty"),
    ("$$", "5", "nothing between the delimiters"),
    ("0.33", "1/3", "two decimal places only"),
    ("1.2", "1,2", "no decimal comma"),
    ("1,23", "123", "a comma that separates no thousands"),
    ("1, 234", "1234", "a comma and a space make a list"),
    ("10 5", "50", "neighbouring numbers are not multiplied"),
    ("10 000", "0", "nor is a space inside a number"),
    ("5\u00b2", "52", "plain NFKC would drop the superscript"),
    ("3\u00bd", "31/2", "and join the vulgar fraction"),
    ("30 cm", "30 m", "two units"),
    ("5 m/s^2", "5 m/s", "two units"),
    ("3c", "3", "a variable that math-verify's own list takes for a unit"),
    ("2", "2m", "a variable, not metres"),
    ("60%", "50%", "two percentages"),
    ("1, 2, 3, 4", "4", "a list is not its last element"),
    ("3 or 4", "4", "nor are alternatives"),
    ("x = 1, x = 2, x = 3", "3", "nor are several equations"),
    ("The options are 3 and 4", "4", "a number in a sentence"),
    ("Figure 3", "3", "a number in a label"),
    ("(2, 1)", "(1, 2)", "a point has an order"),
    ("[1, 2]", "(1, 2)", "closed and open"),
    ("y = 5", "x = 5", "another variable"),
    ("12:30", "6:15", "clock times are no quotients"),
    ("felt", "left", "letters are not multiplied"),
    ("ABC", "BAC", "nor are names of angles"),
    ("3 cast", "3 cats", "nor are words"),
    ("no", "yes", "another word"),
    ("C", "B", "another choice"),
    ("A or B", "A", "two choices"),
    ("A, B", "A", "two choices"),
    ("B 12 cm", "B", "a letter without a delimiter is no choice"),
    ("B. 13 cm", "B. 12 cm", "the same letter with another text"),
    ("bananasplit", "banana split", "an `a` inside a word is no article"),
    ("\\frac{1}{", "1", "bad LaTeX"),
    ("\\foo{5}", "5", "an unknown command"),
    ("1/0", "5", "a division by zero"),
    ("5", ["6", "7"], "none of a list"),
]


@pytest.mark.parametrize("prediction, ground_truth, reason", RIGHT)
def test_right(prediction, ground_truth, reason):
    assert grade_answer(prediction, ground_truth) is True, reason


@pytest.mark.parametrize("prediction, ground_truth, reason", WRONG)
def test_wrong(prediction, ground_truth, reason):
    assert grade_answer(prediction, ground_truth) is False, reason


@pytest.mark.parametrize("prediction", [None, 5, ["5"]])
def test_prediction_must_be_a_string(prediction):
    with pytest.raises(TypeError, match="prediction must be a str; got "):
        grade_answer(prediction, "5")


@pytest.mark.parametrize(
    "ground_truth, error, message",
    [
        (None, ValueError, "must not be None; got None for data_source 'geo3k', index 3"),
        ([], ValueError, "must hold at least one answer; got .* index 3"),
        (np.array([]), ValueError, "must hold at least one answer"),
        ("  ", ValueError, "must not be empty; got '  ' for .* index 3"),
        (["5", ""], ValueError, "must not be empty"),
        (float("nan"), ValueError, "must be finite; got nan for .* index 3"),
        (float("inf"), ValueError, "must be finite; got inf"),
        (True, TypeError, "got bool for .* index 3"),
        ([None], TypeError, "got NoneType"),
        ({"answer": "5"}, TypeError, "got dict"),
        ([["5"]], TypeError, "got list"),
        (1j, TypeError, "got complex"),
    ],
)
def test_ground_truth_is_validated(ground_truth, error, message):
    with pytest.raises(error, match=message):
        accepted_answers(ground_truth, sample_name("geo3k", {"index": 3}))
    with pytest.raises(error):
        grade_answer("5", ground_truth)


def test_sample_name_without_extra_info():
    assert sample_name("geo3k", None) == "data_source 'geo3k', index None"


def test_missing_math_verify_names_the_package(monkeypatch):
    expressions.load_math_verify.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="needs the package math-verify.*pip install math-verify"):
        grade_answer("5", "5")
    monkeypatch.undo()
    assert grade_answer("5", "5")  # the failure is not cached


def test_worker_threads_grade_as_the_main_thread_does():
    # verl scores in a thread pool, where math-verify's own timeouts raise, for want of SIGALRM.
    cases = [case[:2] for case in (RIGHT + WRONG) if isinstance(case[1], str)][::4]
    expected = [grade_answer(*case) for case in cases]
    with ThreadPoolExecutor(max_workers=4) as pool:
        assert list(pool.map(lambda case: grade_answer(*case), cases)) == expected
    assert True in expected and False in expected


def test_main_thread_leaves_signals_and_profiler_alone():
    def handler(signum, frame):
        raise AssertionError("an alarm went off")

    def profiler(frame, event, arg):
        return None

    previous = signal.signal(signal.SIGALRM, handler)
    sys.setprofile(profiler)
    try:
        assert grade_answer("1/2", "0.5")
        assert sys.getprofile() is profiler
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        sys.setprofile(None)
        signal.signal(signal.SIGALRM, previous)


def test_long_answers_are_compared_as_text_only(caplog):
    short, long = ("1" + "+1" * n for n in ((expressions.MAX_MATH_CHARS - 1) // 2, expressions.MAX_MATH_CHARS))
    assert grade_answer(short, str((expressions.MAX_MATH_CHARS - 1) // 2 + 1))
    with caplog.at_level(logging.DEBUG, "avar_verl.rewards"):
        assert not grade_answer(long, str(expressions.MAX_MATH_CHARS + 1))
        assert grade_answer(long, f"$ {long} $"), "the text match has no limit"
    assert f"more than {expressions.MAX_MATH_CHARS} characters" in caplog.text


@pytest.mark.parametrize(
    "hard",
    [
        "9^{9^{9}}",
        "9^9^9",
        "9^(9^9)",
        "((9^{999})^{999})^{999}",
        "((9^{6})^{8})^{9}",
        "9^{99\\cdot 99\\cdot 99}",
        "9^{-99999999}",
        "2^{\\frac{9^9}{2}}",
        "99999999!",
        "(99999999)_{9999}",
        "\\prod_{i=1}^{99999999} i",
        "\\binom{99999999}{9999999}",
    ],
)
def test_input_that_no_limit_on_calls_could_interrupt_is_compared_as_text_only(hard):
    assert expressions.to_latex(accuracy.clean(hard)) is None
    assert not grade_answer(hard, "5")
    assert grade_answer(hard, hard)


@pytest.mark.parametrize("power", ["10^{23}", "2^{64}", "(1+0.05)^{10}", "x^{5}+x^{4}+x^{3}", "e^{-2x}", "3^{n+1}"])
def test_ordinary_powers_are_math(power):
    assert expressions.to_latex(accuracy.clean(power)) is not None


def test_the_limit_on_calls_ends_endless_comparisons(monkeypatch):
    # Unlimited, sympy works for minutes at least on each of these.
    cases = [
        ("\\sqrt[3]{|\\sqrt{i}|}+\\cos(y^2+e+105)", "x^2+1"),
        ("z=\\sqrt{z-(\\sqrt{z}-\\sqrt{e})}", "2x+3y=5"),
        ("x+\\cos((z+12)^{10})", "\\sqrt{2}"),
    ]
    monkeypatch.setattr(expressions, "MAX_MATH_CALLS", 300_000)
    start = time.process_time()
    assert [grade_answer(*case) for case in cases] == [False, False, False]
    assert time.process_time() - start < 5
    monkeypatch.undo()
    assert sys.getprofile() is None
    assert grade_answer("1/2", "0.5"), "grading goes on as before"


def test_limit_calls_raises_at_the_limit_in_any_thread():
    class Stop(BaseException):
        pass

    def work(calls):
        for _ in range(calls):
            len("")
        return True

    def outcome(calls):
        try:
            return expressions._limit_calls(lambda: work(calls), 1000, Stop)
        except Stop:
            return "stopped"

    with ThreadPoolExecutor(max_workers=1) as pool:
        assert [outcome(10), outcome(10_000)] == [True, "stopped"]
        assert list(pool.map(outcome, [10, 10_000])) == [True, "stopped"]


@pytest.mark.parametrize("limit", range(100, 110))
def test_limit_calls_is_not_lost_in_a_generator_that_is_closed(limit):
    class Stop(BaseException):
        pass

    def work():
        for _ in range(1000):
            next(number for number in (1, 2))  # left unfinished, so Python closes it and drops what is raised then

    with pytest.raises(Stop):
        expressions._limit_calls(work, limit, Stop)


def test_what_happened_is_logged_at_debug_level(caplog):
    with caplog.at_level(logging.DEBUG, "avar_verl.rewards"):
        grade_answer("1+", "5")
        grade_answer("30 cm", "30 m")
        grade_answer("a sentence", "5")
    assert "cannot parse '1+'" in caplog.text
    assert "different units" in caplog.text
    assert "compared as text only" in caplog.text
    assert {record.levelno for record in caplog.records if record.name.startswith("avar_verl.rewards")} == {
        logging.DEBUG
    }


@pytest.mark.parametrize(
    "piece",
    ["<answer>", "</answer>", "<think>", "\\boxed{", "{", "}", "\\", " ", "^{", "1,234", "\\text{", "\u00b2", "("],
)
def test_linear_time_on_200k_characters(piece):
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    extract_answer(text)
    extract_answer("<answer>" + text + "</answer>")
    grade_answer(text, "5")
    assert time.process_time() - start < 2


def test_grading_does_not_depend_on_the_order_of_calls():
    cases = [case[:2] for case in RIGHT[::5] + WRONG[::5]]
    forward = [grade_answer(*case) for case in cases]
    backward = [grade_answer(*case) for case in reversed(cases)]
    assert forward == backward[::-1]


def test_no_thread_is_left_behind():
    before = threading.active_count()
    grade_answer("1/2", "0.5")
    assert threading.active_count() == before


def test_doctests():
    results = doctest.testmod(accuracy)
    assert results.attempted >= 5 and results.failed == 0
