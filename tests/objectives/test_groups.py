# SPDX-License-Identifier: Apache-2.0
"""Ranks and normalised values of rollouts in their groups, against the definitions."""

import doctest

import pytest
import torch

from avar_verl.objectives import groups
from avar_verl.objectives.groups import group_index, group_normalize, group_rank


def reference_rank(x, names):
    """The definition: below + (equal + 1) / 2, over the size of the group."""
    out = []
    for value, name in zip(x, names, strict=True):
        own = [other for other, group in zip(x, names, strict=True) if group == name]
        below, equal = sum(other < value for other in own), sum(other == value for other in own)
        out.append((below + (equal + 1) / 2) / len(own))
    return out


def test_doctests():
    results = doctest.testmod(groups)
    assert results.attempted >= 3 and results.failed == 0


def test_groups_are_numbered_as_they_appear():
    assert group_index(["u7", ("a", 1), "u7", "u2"]).tolist() == [0, 1, 0, 2]
    assert group_index([]).tolist() == [] and group_index([]).dtype == torch.int64


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_ranks_are_those_of_the_definition(levels):
    """Groups of several sizes in any order; few levels make ties within and across groups."""
    generator = torch.Generator().manual_seed(levels)
    x = torch.randint(levels, (200,), generator=generator).float() / 7
    names = torch.randint(23, (200,), generator=generator).tolist()
    assert group_rank(x, group_index(names)).tolist() == pytest.approx(reference_rank(x.tolist(), names))


def test_nothing_to_rank_or_normalise():
    empty = torch.zeros(0)
    assert group_rank(empty, group_index([])).shape == group_normalize(empty, group_index([])).shape == (0,)


def test_normalised_by_hand():
    """Group a: 1, 3, 5, mean 3, std sqrt((4 + 0 + 4) / 2) = 2. Group b: two, mean 0.5, std sqrt(0.5). Group c: one."""
    x = torch.tensor([1.0, 0.0, 3.0, 7.0, 5.0, 1.0])
    out = group_normalize(x, group_index(list("abacab")))
    half = 0.5**0.5
    assert out.tolist() == pytest.approx([-1, -half, 0, 7, 1, half], rel=1e-5) and out.dtype == torch.float32
    coarse = group_normalize(x, group_index(list("abacab")), epsilon=2.0)
    assert coarse[[0, 2, 4]].tolist() == pytest.approx([-0.5, 0, 0.5])


def test_equal_values_give_zero_however_large():
    x = torch.tensor([0.1, 1e7 / 3]).repeat(7)
    assert group_normalize(x, group_index(list("ab") * 7)).tolist() == [0.0] * 14


def test_scale_and_offset_of_a_group_do_not_matter():
    x = torch.rand(12, generator=torch.Generator().manual_seed(0))
    group = group_index(list("abbabaabbbaa"))
    scaled = torch.where(group == 0, 50 * x + 3, x)
    torch.testing.assert_close(group_normalize(scaled, group), group_normalize(x, group), rtol=1e-4, atol=1e-5)
