# SPDX-License-Identifier: Apache-2.0
"""VAS and its companions by hand."""

import math

import pytest
import torch

from avar_verl.objectives.vas import attention_ratio, image_share, vas_sums
from avar_verl.roles import TokenRole

S, I, R = TokenRole.SYSTEM, TokenRole.IMAGE, TokenRole.RESPONSE


def one_sample(image: list, system: list) -> torch.Tensor:
    """(1, 1, H, Q, 5)."""
    mass = torch.zeros(1, 1, len(image), len(image[0]), len(TokenRole))
    mass[..., I], mass[..., S] = torch.tensor(image), torch.tensor(system)
    return mass


def test_by_hand():
    """Ratios: head 0 2 and 4, head 1 1 and 1: VAS 2. Means: image 0.3, system 0.1875."""
    mass = one_sample([[0.4, 0.4], [0.2, 0.2]], [[0.2, 0.1], [0.2, 0.2]])
    summary = vas_sums(mass, torch.tensor([[S, I, R]]), torch.tensor([[True, True]])).summary()
    assert summary["vas"] == pytest.approx(2.0)
    assert summary["vas_median"] == pytest.approx((3 + 1) / 2)
    assert summary["ratio_of_means"] == pytest.approx(0.3 / 0.175)
    assert summary["log_ratio"] == pytest.approx(math.log(0.3 / 0.175))
    assert summary["image_share"] == pytest.approx((2 / 3 + 4 / 5 + 1 / 2 + 1 / 2) / 4)
    assert summary["image_mass"] == pytest.approx(0.3) and summary["system_mass"] == pytest.approx(0.175)


def test_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(4, 2, 3, 5, 5, generator=generator)
    roles = torch.tensor([[S, I, R]] * 4)
    valid = torch.rand(4, 5, generator=generator) > 0.3
    whole = vas_sums(mass, roles, valid).summary()
    parts = vas_sums(mass[:1], roles[:1], valid[:1]) + vas_sums(mass[1:], roles[1:], valid[1:])
    assert parts.summary() == pytest.approx(whole)
    assert parts.num_samples == 4 and parts.num_queries == int(valid.sum())


def test_samples_for_which_vas_is_not_defined_are_skipped_and_counted():
    mass = torch.rand(4, 1, 1, 2, 5)
    roles = torch.tensor([[S, I, R], [R, I, R], [S, R, R], [S, I, R]])  # whole, no system, no image, no query
    valid = torch.tensor([[True, True]] * 3 + [[False, False]])
    sums = vas_sums(mass, roles, valid)
    assert (sums.num_samples, sums.num_skipped, sums.num_queries) == (1, 3, 2)
    with pytest.raises(ValueError, match="got none in 3 samples"):
        vas_sums(mass[1:], roles[1:], valid[1:]).summary()


def test_no_number_is_made_up_by_an_epsilon():
    mass = one_sample([[0.5]], [[0.0]])
    assert attention_ratio(mass).item() == math.inf and image_share(mass).item() == 1
    assert math.isnan(attention_ratio(one_sample([[0.0]], [[0.0]])).item())
    summary = vas_sums(mass, torch.tensor([[S, I, R]]), torch.tensor([[True]])).summary()
    assert summary["vas"] == math.inf and summary["ratio_of_means"] == math.inf
