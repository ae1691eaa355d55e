# SPDX-License-Identifier: Apache-2.0
"""Rewards of parts: weights, gates, functions of the user's, and what is refused."""

import sys

import pytest

import reward_fns.avar
import reward_fns.compose
from avar_verl.rewards.compose import PARTS, check_parts, composed_score, load_function

RIGHT = "<think>In the image there is a cup. " + "So on. " * 30 + "</think><answer>4</answer>"
WRONG = RIGHT.replace("4", "5")
GATED = {"acc": {"weight": 1.0}, "anchor": {"weight": 0.4, "gate": "acc"}}


@pytest.mark.parametrize("text, score", [(RIGHT, 1 + 0.4 / 3), (WRONG, 0.0)])
def test_gate_by_hand(text, score):
    result = composed_score("x", text, "4", None, GATED)
    assert result["score"] == pytest.approx(score)
    assert result["anchor"] == pytest.approx(1 / 3)  # Parts are reported as they are, paid or not.
    ungated = {**GATED, "anchor": {"weight": 0.4}}
    assert composed_score("x", text, "4", None, ungated)["score"] == pytest.approx((text is RIGHT) + 0.4 / 3)


def test_equals_the_shipped_reward():
    parts = {"acc": {"weight": 1.0}, "format": {"weight": 0.1}}
    for text in (RIGHT, WRONG, "4", ""):
        shipped = reward_fns.avar.compute_score("x", text, "4")
        assert reward_fns.compose.compute_score("x", text, "4", parts=parts) == pytest.approx(shipped)


def test_a_negative_weight_is_a_penalty():
    parts = {"acc": {"weight": 1.0}, "anchor": {"weight": -0.4}}
    assert composed_score("x", RIGHT, "4", None, parts)["score"] == pytest.approx(1 - 0.4 / 3)


def test_settings_reach_their_part():
    parts = {"anchor": {"weight": 1.0, "settings": {"phrase_weight": 1.0, "num_parts": 2}}}
    assert composed_score("x", RIGHT, "4", None, parts)["score"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("form", ["path", "pkg"])
def test_a_users_function_is_a_part(tmp_path, monkeypatch, form):
    (tmp_path / "mine_for_tests.py").write_text(
        "def brevity(data_source, solution_str, ground_truth, extra_info, longest=100):\n"
        "    return {'score': float(len(solution_str) < longest), 'characters': len(solution_str)}\n"
        "def plain(solution_str, **rest):\n"
        "    return 0.5\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module = "pkg://mine_for_tests" if form == "pkg" else str(tmp_path / "mine_for_tests.py")
    parts = {
        "acc": {"weight": 1.0},
        "brevity": {"weight": 0.2, "function": f"{module}:brevity", "settings": {"longest": 1000}, "gate": "acc"},
        "half": {"weight": 1.0, "function": f"{module}:plain"},
    }
    result = composed_score("x", RIGHT, "4", None, parts)
    assert result["score"] == pytest.approx(1 + 0.2 + 0.5)
    assert result["brevity"] == 1.0 and result["brevity/characters"] == len(RIGHT) and result["half"] == 0.5


@pytest.mark.parametrize(
    "parts, message",
    [
        ({}, "parts must be a mapping of at least one name"),
        (None, "parts must be a mapping of at least one name"),
        (["acc"], "parts must be a mapping of at least one name"),
        ({"acc": {"wieght": 1}}, r"a part has weight, gate, function and settings; got \['wieght'\] in 'acc'"),
        ({"accuracy": {"weight": 1}}, "a part is one of .* or names its function; got 'accuracy' without one"),
        ({"score": {"weight": 1, "function": "x:y"}}, "verl keeps 'score' for the total"),
        ({"acc": {}}, "weight must be a finite number; got None in 'acc'"),
        ({"acc": {"weight": float("nan")}}, "weight must be a finite number; got nan"),
        ({"acc": {"weight": True}}, "weight must be a finite number; got True"),
        (
            {"anchor": {"weight": 1, "gate": "acc"}, "acc": {"weight": 1}},
            r"an earlier part; got 'acc' in 'anchor' after",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        check_parts(parts)


def test_a_users_dict_without_a_score_is_refused(tmp_path):
    (tmp_path / "bad.py").write_text("def f(**kwargs):\n    return {'acc': 1.0}\n")
    with pytest.raises(ValueError, match="returns a number or a dict with 'score'; .* returned"):
        composed_score("x", "", "4", None, {"mine": {"weight": 1, "function": f"{tmp_path / 'bad.py'}:f"}})


def test_a_function_from_no_python_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must come from a .py file or pkg://module; got '.*reward.txt:f'"):
        load_function(f"{tmp_path / 'reward.txt'}:f")


def test_grounding_reads_the_samples_boxes():
    parts = {"grounding": {"weight": 1.0, "settings": {"coordinates": "absolute"}}}
    # A stored image of 200 x 100, which the model saw at 400 x 200.
    info = {"boxes": [[20, 10, 60, 40]], "boxes_size": [200, 100], "image_sizes": [[400, 200]]}
    right = '<think>{"bbox_2d": [40, 20, 120, 80]}</think><answer>4</answer>'
    assert composed_score("x", right, "4", info, parts) == {"score": 1.0, "grounding": 1.0, "num_boxes": 1.0}
    assert composed_score("x", "no box", "4", info, parts)["grounding"] == 0.0
    with pytest.raises(ValueError, match="compares with extra_info.*got .* for data_source 'x', index 7"):
        composed_score("x", right, "4", {"index": 7}, parts)
    unknown_size = {**info, "image_sizes": [[400, 200], [28, 28]]}
    with pytest.raises(ValueError, match="boxes in pixels need the size of the image that the model saw"):
        composed_score("x", right, "4", unknown_size, parts)
    relative = {"grounding": {"weight": 1.0, "settings": {"coordinates": "relative_1000"}}}
    assert composed_score("x", '{"bbox_2d": [100, 100, 300, 400]}', "4", info, relative)["grounding"] == 1.0


def test_every_part_has_its_own_name_among_its_values():
    info = {"boxes": [], "boxes_size": [10, 10]}
    for name, part in PARTS.items():
        assert name in part("x", RIGHT, "4", info)
