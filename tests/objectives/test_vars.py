# SPDX-License-Identifier: Apache-2.0
"""r_visual by hand: the formula, the gate, the shapings."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avar_verl.objectives.vars import (
    MASS_FIELDS,
    SHAPINGS,
    STATISTICS,
    VISUAL_FIELDS,
    VisualReduction,
    shape_visual_reward,
    visual_fields,
)
from avar_verl.roles import TokenRole

S, I, R = TokenRole.SYSTEM, TokenRole.IMAGE, TokenRole.RESPONSE
YES = torch.tensor([True, True, True, True])


def layer_of(image: list, system: list) -> torch.Tensor:
    """(1, H, Q, 5) of one layer; image and system are (H, Q)."""
    mass = torch.zeros(1, len(image), len(image[0]), 5)
    mass[0, ..., I], mass[0, ..., S] = torch.tensor(image), torch.tensor(system)
    return mass


def fields(layers: list, valid: list, roles: list, epsilon: float = 1e-6) -> dict:
    valid_BQ = torch.tensor([valid])
    per_layer = [VisualReduction(epsilon)(layer, valid_BQ) for layer in layers]
    out = visual_fields(per_layer, torch.tensor([roles]), valid_BQ)
    assert out.dtype == torch.float32
    return dict(zip(MASS_FIELDS, out[0].tolist(), strict=True))


def test_mean_over_heads_first_then_ratio_then_queries():
    """Heads average to image 0.3, 0.1 and system 0.1, 0.2: ratios 3 and 0.5, mean 1.75; filling does not count.

    VAS is the mean of each head's own ratios, 4, 1 / 3, 2 and 1.
    """
    layer = layer_of([[0.4, 0.1, 0.9], [0.2, 0.1, 0.9]], [[0.1, 0.3, 0.01], [0.1, 0.1, 0.01]])
    out = fields([layer, layer], [True, True, False], [S, I, R])
    assert out["ratio"] == pytest.approx(1.75, rel=1e-4)
    assert out["vas"] == pytest.approx(22 / 12)
    assert out["image_share"] == pytest.approx((0.75 + 1 / 3) / 2)
    assert out["image_mass"] == pytest.approx(0.2) and out["system_mass"] == pytest.approx(0.15)
    assert (out["num_queries"], out["num_image"], out["num_system"]) == (2, 1, 1)


def test_layers_are_averaged_after_the_ratio():
    """Ratios 0.4 / 0.1 = 4 and 0.1 / 0.2 = 0.5 in two layers: 2.25, not 0.5 / 0.3."""
    out = fields([layer_of([[0.4]], [[0.1]]), layer_of([[0.1]], [[0.2]])], [True], [S, S, I, I, I, R])
    assert out["ratio"] == pytest.approx(2.25, rel=1e-4)
    assert out["image_share"] == pytest.approx((0.8 + 1 / 3) / 2)
    assert (out["num_image"], out["num_system"]) == (3, 2)


def test_epsilon_bounds_the_ratio_of_a_starved_denominator():
    """0.5 / (0 + 0.01) = 50, and the share is 1."""
    out = fields([layer_of([[0.5]], [[0.0]])], [True], [S, I, R], epsilon=0.01)
    assert out["ratio"] == pytest.approx(50) and out["image_share"] == 1
    assert out["vas"] == math.inf  # The metric has no epsilon.


@pytest.mark.parametrize("split", [1, 2])
def test_micro_batches_and_filling_change_nothing(split):
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(3, 2, 4, 5, generator=generator)
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 3 + [False]])
    roles = torch.tensor([[S, I, R, R]] * 3)

    def of(rows: slice, num_queries: int = 4):
        part, real = mass[rows, :, :num_queries], valid[rows, :num_queries]
        return visual_fields([VisualReduction(1e-6)(part * real[:, None, :, None], real)], roles[rows], real)

    whole = of(slice(None))
    torch.testing.assert_close(torch.cat([of(slice(0, split)), of(slice(split, None))]), whole)
    torch.testing.assert_close(of(slice(1, 2), num_queries=2), whole[1:2])  # as few columns as it needs


def test_what_is_not_defined_is_nan():
    no_system = fields([layer_of([[0.4]], [[0.0]])], [True], [R, I, R])
    assert math.isnan(no_system["ratio"]) and math.isnan(no_system["image_share"])
    assert math.isnan(no_system["vas"])
    assert no_system["image_mass"] == pytest.approx(0.4) and no_system["num_system"] == 0
    no_response = fields([layer_of([[0.4]], [[0.2]])], [False], [S, I, R])
    assert all(math.isnan(no_response[key]) for key in ("ratio", "image_share", "image_mass", "system_mass", "vas"))
    assert no_response["num_queries"] == 0
    no_image = fields([layer_of([[0.0]], [[0.2]])], [True], [S, R, R])
    assert no_image["ratio"] == no_image["image_share"] == no_image["vas"] == no_image["num_image"] == 0


def test_a_batch_in_which_nobody_has_a_response():
    valid = torch.zeros(2, 0, dtype=torch.bool)
    out = visual_fields([VisualReduction(1e-6)(torch.zeros(2, 3, 0, 5), valid)], torch.zeros(2, 4).long(), valid)
    assert out.shape == (2, len(MASS_FIELDS)) and bool(torch.isnan(out[:, :5]).all()) and not out[:, 5:].any()


@pytest.mark.parametrize(
    "shaping, clip_max, expected",
    [
        ("none", None, [2.0, 8.0, 8.0, 0.5]),
        ("clip", 3.0, [2.0, 3.0, 3.0, 0.5]),
        ("log", None, [math.log(3), math.log(9), math.log(9), math.log(1.5)]),
        # group a: 2 < 8 = 8, ranks 1, 2.5, 2.5 of 3; group b has one: 1 of 1
        ("rank", None, [1 / 3, 2.5 / 3, 2.5 / 3, 1.0]),
    ],
)
def test_shapings(shaping, clip_max, expected):
    raw = torch.tensor([2.0, 8.0, 8.0, 0.5])
    out = shape_visual_reward(raw, YES, ["a", "a", "a", "b"], shaping, clip_max)
    assert out.tolist() == pytest.approx(expected) and out.dtype == torch.float32


def test_ranks_are_among_the_right_answers_of_a_group():
    """Group a: right 5, 1, 3 among wrong 9, 2: ranks 3, 1, 2 of 3. Group b, interleaved: a tie of two, 1.5 of 2."""
    raw = torch.tensor([5.0, 7.0, 9.0, 1.0, 3.0, 7.0, 2.0])
    correct = torch.tensor([True, True, False, True, True, True, False])
    out = shape_visual_reward(raw, correct, ["a", "b", "a", "a", "a", "b", "a"], "rank")
    assert out.tolist() == pytest.approx([1, 0.75, 0, 1 / 3, 2 / 3, 0.75, 0])


def test_ranks_do_not_depend_on_the_scale_or_the_order():
    raw = torch.rand(8, generator=torch.Generator().manual_seed(0))
    correct, groups = torch.tensor([True, True, False, True] * 2), list("aabbabab")
    ranks = shape_visual_reward(raw, correct, groups, "rank")
    assert torch.equal(shape_visual_reward(raw * 1e6 + 3, correct, groups, "rank"), ranks)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    mixed = shape_visual_reward(raw[order], correct[order], [groups[i] for i in order], "rank")
    assert torch.equal(mixed, ranks[order])


class Uid:
    """A group id that counts how often ids are hashed or compared."""

    uses = 0

    def __init__(self, name):
        self.name = name

    def __hash__(self):
        Uid.uses += 1
        return hash(self.name)

    def __eq__(self, other):
        Uid.uses += 1
        return self.name == other.name


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return out


def test_ranks_of_a_large_batch_take_linear_work(monkeypatch):
    """256 prompts x 8 rollouts: ids are looked up twice a rollout, no tensor has a cell for each pair."""
    monkeypatch.setattr(Uid, "uses", 0)
    B = 256 * 8
    groups = [Uid(index // 8) for index in range(B)]
    raw = torch.rand(B, generator=torch.Generator().manual_seed(3))
    with LargestTensor() as largest:
        ranks = shape_visual_reward(raw, torch.ones(B, dtype=torch.bool), groups, "rank")
    assert torch.equal(ranks.view(256, 8).sort(1).values, (torch.arange(1, 9) / 8).expand(256, 8))
    assert B <= Uid.uses <= 4 * B
    assert B <= largest.elements <= 4 * B


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("wrong", [1e9, math.nan, math.inf, 0.0])
def test_a_wrong_answer_is_paid_nothing_whatever_it_looked_at(shaping, wrong):
    raw = torch.tensor([2.0, wrong, 0.5])
    correct = torch.tensor([True, False, True])
    out = shape_visual_reward(raw, correct, ["a"] * 3, shaping, 3.0)
    assert out[1] == 0 and bool((out[[0, 2]] > 0).all())
    # and moves nobody else's reward
    assert torch.equal(out[[0, 2]], shape_visual_reward(raw[[0, 2]], correct[[0, 2]], ["a"] * 2, shaping, 3.0))


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_right_answer_without_a_defined_ratio_is_an_error(value, shaping):
    with pytest.raises(ValueError, match=r"at rows \[1\]. Give the prompts a system turn"):
        shape_visual_reward(torch.tensor([1.0, value]), torch.tensor([True, True]), ["a", "a"], shaping, 3.0)


def test_unknown_shaping():
    with pytest.raises(ValueError, match="shaping must be one of"):
        shape_visual_reward(torch.ones(1), torch.tensor([True]), ["a"], "square")


def test_statistics_are_fields():
    assert set(STATISTICS) < set(VISUAL_FIELDS)


def test_layer_weights_of_visual_fields():
    per_layer = [torch.tensor([[4.0, 0.8, 0.4, 0.1, 9.0]]), torch.tensor([[2.0, 0.4, 0.2, 0.1, 5.0]])]
    roles, valid = torch.tensor([[1, 2, 4]]), torch.tensor([[True]])
    out = visual_fields(per_layer, roles, valid, layer_weights=(1.0, 3.0))
    torch.testing.assert_close(out[0, :5], torch.tensor([2.5, 0.5, 0.25, 0.1, 6.0]))
    plain = visual_fields(per_layer, roles, valid)
    torch.testing.assert_close(visual_fields(per_layer, roles, valid, layer_weights=(5.0, 5.0)), plain)


def test_a_dependency_may_be_negative():
    """-0.5 and 2 of right answers, 1 of a wrong one: clip bounds it above only, log is refused, ranks are of both."""
    raw, correct = torch.tensor([-0.5, 2.0, 1.0]), torch.tensor([True, True, False])
    assert shape_visual_reward(raw, correct, ["a"] * 3).tolist() == [-0.5, 2.0, 0.0]
    assert shape_visual_reward(raw, correct, ["a"] * 3, "clip", 1.0).tolist() == [-0.5, 1.0, 0.0]
    assert shape_visual_reward(raw, correct, ["a"] * 3, "rank").tolist() == [0.5, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"shaping=log needs a statistic >= 0; got \[-0.5\]. Set avar.vars.shaping"):
        shape_visual_reward(raw, correct, ["a"] * 3, "log")
    assert shape_visual_reward(raw, ~correct, ["a"] * 3, "log").tolist()[:2] == [0.0, 0.0]
