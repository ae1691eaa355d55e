# SPDX-License-Identifier: Apache-2.0
"""Hand-made cases for `avar_verl.rewards.format`, each with its reason."""

import doctest
import importlib
import time

import pytest

from avar_verl.rewards.format import format_score

GOOD = [
    ("<think>a</think><answer>b</answer>", "the plain layout"),
    ("<think>\na\nb\n</think>\n<answer>\nc\nd\n</answer>", "over several lines"),
    ("\n<think>a</think>\n\n<answer>b</answer>\n", "new lines before, between and after"),
    (" \t<think>a</think> \t<answer>b</answer> ", "blanks before, between and after"),
    ("<think>a</think><answer>\\boxed{\\frac{1}{2}}</answer>", "a box in the answer"),
    ("<think>1 < 2 and 3 > 2</think><answer>x<5</answer>", "angle brackets that are no tags"),
    ("<think><b>a</b></think><answer>b</answer>", "other tags are text"),
]

BAD = [
    ("", "empty"),
    ("b", "no tags"),
    ("<answer>b</answer>", "no think block"),
    ("<think>a</think>", "no answer block"),
    ("<think>a</think>\\boxed{b}", "a box is no answer block"),
    ("<think>a", "truncated reasoning"),
    ("<think>a</think><answer>b", "truncated answer"),
    ("a</think><answer>b</answer>", "the opening think tag is missing"),
    ("<think>a<answer>b</answer>", "the closing think tag is missing"),
    ("x<think>a</think><answer>b</answer>", "text before"),
    ("<think>a</think>x<answer>b</answer>", "text between"),
    ("<think>a</think><answer>b</answer>x", "text after"),
    ("<answer>b</answer><think>a</think>", "the wrong order"),
    ("<think>a<answer>b</answer></think>", "the answer inside the reasoning"),
    ("<think>a<answer>b</think></answer>", "interleaved blocks"),
    ("</think>a<think><answer>b</answer>", "closed before it is opened"),
    ("<think>a</think></answer>b<answer>", "the answer closed before it is opened"),
    ("<think>a</think><think>a</think><answer>b</answer>", "a repeated think block"),
    ("<think>a</think><answer>b</answer><answer>b</answer>", "a repeated answer block"),
    ("<think><think>a</think></think><answer>b</answer>", "a nested think block"),
    ("<think>a</think><answer><answer>b</answer></answer>", "a nested answer block"),
    ("<think></think><answer>b</answer>", "empty reasoning"),
    ("<think> \n</think><answer>b</answer>", "blank reasoning"),
    ("<think>a</think><answer></answer>", "an empty answer"),
    ("<think>a</think><answer> \n</answer>", "a blank answer"),
    ("<Think>a</Think><Answer>b</Answer>", "tags are case-sensitive"),
]


@pytest.mark.parametrize("text, reason", GOOD)
def test_good(text, reason):
    score = format_score(text)
    assert score == 1.0 and type(score) is float, reason


@pytest.mark.parametrize("text, reason", BAD)
def test_bad(text, reason):
    score = format_score(text)
    assert score == 0.0 and type(score) is float, reason


@pytest.mark.parametrize("text, reason", [case for case in GOOD if case[0].startswith("<think>")])
def test_think_in_prompt(text, reason):
    assert format_score(text.removeprefix("<think>"), think_in_prompt=True) == 1.0, reason
    assert format_score(text, think_in_prompt=True) == 0.0, "the prompt has the tag already"


@pytest.mark.parametrize("text", [None, 5, b"<think>a</think><answer>b</answer>"])
def test_rejects_what_is_no_string(text):
    with pytest.raises(TypeError, match="text must be a str; got "):
        format_score(text)


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<answer>", "<think>a</think><answer>", "<", "<think", " ", "\n"]
)
def test_linear_time_on_200k_characters(piece):
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    assert format_score(text) == 0.0
    assert format_score(f"<think>{text}</think>{text}<answer>{text}</answer>{text}") == 0.0
    assert time.process_time() - start < 1


def test_doctests():
    results = doctest.testmod(importlib.import_module("avar_verl.rewards.format"))
    assert results.attempted >= 3 and results.failed == 0
