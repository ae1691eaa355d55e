# SPDX-License-Identifier: Apache-2.0
"""VAS and its companions by hand."""

import math

import pytest
import torch

from avar_verl.objectives.vas import BANDS, attention_ratio, image_share, vas_sums
from avar_verl.roles import TokenRole

S, I, R = TokenRole.SYSTEM, TokenRole.IMAGE, TokenRole.RESPONSE
WHOLE = torch.tensor([[S, I, R]])


def one_sample(image: list, system: list) -> torch.Tensor:
    """(1, 1, H, Q, 5)."""
    mass = torch.zeros(1, 1, len(image), len(image[0]), len(TokenRole))
    mass[..., I], mass[..., S] = torch.tensor(image), torch.tensor(system)
    return mass


def test_by_hand():
    """Ratios: head 0 2 and 4, head 1 1 and 1: VAS (2 + 4 + 1 + 1) / 4 = 2. Means: image 0.3, system 0.7 / 4 = 0.175."""
    mass = one_sample([[0.4, 0.4], [0.2, 0.2]], [[0.2, 0.1], [0.2, 0.2]])
    summary = vas_sums(mass, WHOLE, torch.tensor([[True, True]])).summary()
    assert summary["vas"] == pytest.approx(2.0)
    assert summary["vas_median"] == pytest.approx((3 + 1) / 2)
    assert summary["ratio_of_means"] == pytest.approx(0.3 / 0.175)
    assert summary["log_ratio"] == pytest.approx(math.log(0.3 / 0.175))
    assert summary["image_share"] == pytest.approx((2 / 3 + 4 / 5 + 1 / 2 + 1 / 2) / 4)
    assert summary["image_mass"] == pytest.approx(0.3) and summary["system_mass"] == pytest.approx(0.175)


def test_a_median_head_is_not_moved_by_one_that_vanishes():
    """Head ratios 1, 2 and 0.5 / 1e-9: the mean explodes, the median and the share stay."""
    mass = one_sample([[0.2], [0.4], [0.5]], [[0.2], [0.2], [1e-9]])
    summary = vas_sums(mass, WHOLE, torch.tensor([[True]])).summary()
    assert summary["vas"] > 1e8 and summary["vas_median"] == pytest.approx(2)
    assert summary["image_share"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)


def test_sums_are_kept_by_layer_and_head():
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(2, 3, 4, 5, 5, generator=generator)
    sums = vas_sums(mass, WHOLE.expand(2, -1), torch.ones(2, 5, dtype=torch.bool))
    assert sums.ratio_LH.shape == (3, 4) and sums.ratio_LH.dtype == torch.float64
    torch.testing.assert_close(sums.image_LH, mass[..., I].double().sum((0, 3)))
    torch.testing.assert_close(sums.ratio_LH, (mass[..., I].double() / mass[..., S].double()).sum((0, 3)))


@pytest.mark.parametrize("split", [1, 2, 3])
def test_batches_add_up(split):
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(4, 2, 3, 5, 5, generator=generator)
    roles = WHOLE.expand(4, -1)
    valid = torch.rand(4, 5, generator=generator) > 0.3
    whole = vas_sums(mass, roles, valid)
    parts = vas_sums(mass[:split], roles[:split], valid[:split]) + vas_sums(mass[split:], roles[split:], valid[split:])
    assert parts.summary() == pytest.approx(whole.summary())
    assert parts.num_samples == 4 and parts.num_queries == whole.num_queries == int(valid.sum())


def test_filling_does_not_count():
    mass = torch.rand(2, 1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True, True, False], [True, False, False]])
    before = vas_sums(mass, WHOLE.expand(2, -1), valid).summary()
    mass = mass.movedim(3, 1)
    mass[~valid] = 0  # 0 / 0 if it counted
    assert vas_sums(mass.movedim(1, 3), WHOLE.expand(2, -1), valid).summary() == before


def test_samples_for_which_vas_is_not_defined_are_skipped_and_counted():
    mass = torch.rand(4, 1, 1, 2, 5)
    roles = torch.tensor([[S, I, R], [R, I, R], [S, R, R], [S, I, R]])  # whole, no system, no image, no query
    valid = torch.tensor([[True, True]] * 3 + [[False, False]])
    sums = vas_sums(mass, roles, valid)
    assert (sums.num_samples, sums.num_skipped, sums.num_queries) == (1, 3, 2)
    assert sums.summary() == vas_sums(mass[:1], roles[:1], valid[:1]).summary()
    skipped = vas_sums(mass[1:], roles[1:], valid[1:])
    with pytest.raises(ValueError, match="got none in 3 samples"):
        skipped.summary()
    assert (sums + skipped).num_skipped == 6 and (sums + skipped).summary() == sums.summary()


def test_no_number_is_made_up_by_an_epsilon():
    """No system mass: inf. No image mass: 0. Neither: nan, and never a number."""
    query = torch.tensor([[True]])
    no_system, no_image, neither = (one_sample([[a]], [[b]]) for a, b in [(0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
    assert attention_ratio(no_system).item() == math.inf and image_share(no_system).item() == 1
    assert attention_ratio(no_image).item() == 0 and image_share(no_image).item() == 0
    assert math.isnan(attention_ratio(neither).item()) and math.isnan(image_share(neither).item())

    summary = vas_sums(no_system, WHOLE, query).summary()
    assert summary["vas"] == summary["ratio_of_means"] == summary["log_ratio"] == math.inf
    assert summary["image_share"] == 1
    summary = vas_sums(no_image, WHOLE, query).summary()
    assert summary["vas"] == summary["ratio_of_means"] == summary["image_share"] == 0
    assert summary["log_ratio"] == -math.inf
    summary = vas_sums(neither, WHOLE, query).summary()
    assert all(math.isnan(summary[key]) for key in ("vas", "vas_median", "ratio_of_means", "log_ratio", "image_share"))


def test_bands_are_the_papers():
    assert [name for bound, name in BANDS] == ["narrow", "wide", "panoramic"]
    assert [bound for bound, name in BANDS] == [10, 15, math.inf]
