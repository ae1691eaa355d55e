# SPDX-License-Identifier: Apache-2.0
"""r_visual by hand: the formula, the gate, the shapings."""

import math

import pytest
import torch

from avar_verl.objectives.reward import VISUAL_FIELDS, VisualReduction, shape_visual_reward, visual_fields
from avar_verl.roles import TokenRole

S, I, R = TokenRole.SYSTEM, TokenRole.IMAGE, TokenRole.RESPONSE
YES = torch.tensor([True, True, True, True])


def fields(image, system, valid, roles):
    """Two layers with the same masses; image and system are (H, Q)."""
    mass = torch.zeros(1, len(image), len(image[0]), 5)
    mass[0, ..., I], mass[0, ..., S] = torch.tensor(image), torch.tensor(system)
    layer = VisualReduction(1e-6)(mass, torch.tensor([valid]))
    out = visual_fields([layer, layer], torch.tensor([roles]), torch.tensor([valid]))
    return dict(zip(VISUAL_FIELDS, out[0].tolist(), strict=True))


def test_mean_over_heads_first_then_ratio_then_queries():
    """Heads average to image 0.3, 0.1 and system 0.1, 0.2: ratios 3 and 0.5, mean 1.75; filling does not count."""
    out = fields(
        [[0.4, 0.1, 0.9], [0.2, 0.1, 0.9]], [[0.1, 0.3, 0.01], [0.1, 0.1, 0.01]], [True, True, False], [S, I, R]
    )
    assert out["ratio"] == pytest.approx(1.75, rel=1e-4)
    assert out["image_share"] == pytest.approx((0.75 + 1 / 3) / 2)
    assert out["image_mass"] == pytest.approx(0.2) and out["system_mass"] == pytest.approx(0.15)
    assert (out["num_queries"], out["num_image"], out["num_system"]) == (2, 1, 1)


def test_what_is_not_defined_is_nan():
    assert math.isnan(fields([[0.4]], [[0.0]], [True], [R, I, R])["ratio"])  # no system turn
    assert math.isnan(fields([[0.4]], [[0.2]], [False], [S, I, R])["image_share"])  # no response
    assert fields([[0.0]], [[0.2]], [True], [S, R, R])["ratio"] == 0  # no image


@pytest.mark.parametrize(
    "shaping, clip_max, expected",
    [
        ("none", None, [2.0, 8.0, 8.0, 0.5]),
        ("clip", 3.0, [2.0, 3.0, 3.0, 0.5]),
        ("log", None, [math.log(3), math.log(9), math.log(9), math.log(1.5)]),
        # group a: 2 < 8 = 8, ranks 1, 2.5, 2.5 of 3; group b alone: 1 of 1
        ("rank", None, [1 / 3, 2.5 / 3, 2.5 / 3, 1.0]),
    ],
)
def test_shapings(shaping, clip_max, expected):
    raw = torch.tensor([2.0, 8.0, 8.0, 0.5])
    out = shape_visual_reward(raw, YES, ["a", "a", "a", "b"], shaping, clip_max)
    assert out.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("shaping", ["none", "clip", "log", "rank"])
def test_a_wrong_answer_is_paid_nothing_whatever_it_looked_at(shaping):
    raw = torch.tensor([2.0, 1e9, math.nan, 0.5])
    correct = torch.tensor([True, False, False, True])
    out = shape_visual_reward(raw, correct, ["a"] * 4, shaping, 3.0)
    assert out[1:3].tolist() == [0, 0] and bool((out[[0, 3]] > 0).all())
    assert torch.equal(out, shape_visual_reward(raw.where(correct, 0.0), correct, ["a"] * 4, shaping, 3.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_right_answer_without_a_defined_ratio_is_an_error(value):
    with pytest.raises(ValueError, match=r"at rows \[1\]. Give the prompts a system"):
        shape_visual_reward(torch.tensor([1.0, value]), torch.tensor([True, True]), ["a", "a"])


def test_unknown_shaping():
    with pytest.raises(ValueError, match="shaping must be one of"):
        shape_visual_reward(torch.ones(1), torch.tensor([True]), ["a"], "square")
