# SPDX-License-Identifier: Apache-2.0
"""VAS and its companions by hand."""

import math

import pytest
import torch

from avar_verl.objectives.vas import BANDS, attention_ratio, image_share, vas_statistics
from avar_verl.roles import TokenRole

S, I = TokenRole.SYSTEM, TokenRole.IMAGE


def masses(image: list, system: list) -> torch.Tensor:
    """(1, H, Q, R) of one layer."""
    mass = torch.zeros(1, len(image), len(image[0]), len(TokenRole))
    mass[..., I], mass[..., S] = torch.tensor(image), torch.tensor(system)
    return mass


def statistics(mass_LHQR: torch.Tensor) -> dict[str, float]:
    parts = (attention_ratio(mass_LHQR), image_share(mass_LHQR), mass_LHQR[..., I], mass_LHQR[..., S])
    return {name: float(value) for name, value in vas_statistics(*(part.mean(-1) for part in parts)).items()}


def test_by_hand():
    """Ratios: head 0 2 and 4, head 1 1 and 1: VAS (2 + 4 + 1 + 1) / 4 = 2. Means: image 0.3, system 0.7 / 4 = 0.175."""
    mass = masses([[0.4, 0.4], [0.2, 0.2]], [[0.2, 0.1], [0.2, 0.2]])
    summary = statistics(mass)
    assert summary["vas"] == pytest.approx(2.0)
    assert summary["vas_median"] == pytest.approx((3 + 1) / 2)
    assert summary["ratio_of_means"] == pytest.approx(0.3 / 0.175)
    assert summary["log_ratio"] == pytest.approx(math.log(0.3 / 0.175))
    assert summary["image_share"] == pytest.approx((2 / 3 + 4 / 5 + 1 / 2 + 1 / 2) / 4)
    assert summary["image_mass"] == pytest.approx(0.3) and summary["system_mass"] == pytest.approx(0.175)


def test_a_median_head_is_not_moved_by_one_that_vanishes():
    """Head ratios 1, 2 and 0.5 / 1e-9: the mean explodes, the median and the share stay."""
    mass = masses([[0.2], [0.4], [0.5]], [[0.2], [0.2], [1e-9]])
    summary = statistics(mass)
    assert summary["vas"] > 1e8 and summary["vas_median"] == pytest.approx(2)
    assert summary["image_share"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)


def test_leading_dimensions_are_kept():
    means = [torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    whole = vas_statistics(*means)
    for at in ((0, 0), (1, 2)):
        one = vas_statistics(*(mean[at] for mean in means))
        for name, value in whole.items():
            torch.testing.assert_close(value[at], one[name])


def test_no_number_is_made_up_by_an_epsilon():
    """No system mass: inf. No image mass: 0. Neither: nan, and never a number."""
    no_system, no_image, neither = (masses([[a]], [[b]]) for a, b in [(0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
    assert attention_ratio(no_system).item() == math.inf and image_share(no_system).item() == 1
    assert attention_ratio(no_image).item() == 0 and image_share(no_image).item() == 0
    assert math.isnan(attention_ratio(neither).item()) and math.isnan(image_share(neither).item())

    summary = statistics(no_system)
    assert summary["vas"] == summary["ratio_of_means"] == summary["log_ratio"] == math.inf
    assert summary["image_share"] == 1
    summary = statistics(no_image)
    assert summary["vas"] == summary["ratio_of_means"] == summary["image_share"] == 0
    assert summary["log_ratio"] == -math.inf
    summary = statistics(neither)
    assert all(math.isnan(summary[key]) for key in ("vas", "vas_median", "ratio_of_means", "log_ratio", "image_share"))


def test_bands_are_the_papers():
    assert [name for bound, name in BANDS] == ["narrow", "wide", "panoramic"]
    assert [bound for bound, name in BANDS] == [10, 15, math.inf]
