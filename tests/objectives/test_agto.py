# SPDX-License-Identifier: Apache-2.0
"""Guidance terms by hand, and what must not change them."""

import math

import pytest
import torch

from avar_verl.objectives.agto import RATIO, SHARE, agto_terms, mean_over_queries, schedule
from avar_verl.roles import TokenRole

S, I, U, R = TokenRole.SYSTEM, TokenRole.IMAGE, TokenRole.USER, TokenRole.RESPONSE


def masses(image: list, system: list) -> torch.Tensor:
    """(1, H, Q, 5) of one layer from per-head lists of per-query masses; the rest is on user keys."""
    out = torch.zeros(1, len(image), len(image[0]), len(TokenRole))
    out[0, ..., I], out[0, ..., S] = torch.tensor(image), torch.tensor(system)
    out[..., U] = 1 - out.sum(-1)
    return out


def test_terms_by_hand():
    """Two heads, two queries, 4 image and 2 system keys.

    Head means: image (0.4 + 0.2)/2 = 0.3 and 0.5; system 0.2 and (0.1 + 0.3)/2 = 0.2.
    L_enhance = -[log(0.3/4) + log(0.5/4)]/2, L_suppress = [log(0.2/2 + e) + log(0.2/2 + e)]/2.
    """
    layer = masses([[0.4, 0.2], [0.5, 0.5]], [[0.2, 0.2], [0.1, 0.3]])
    roles = torch.tensor([[S, S, I, I, I, I, R, R]])
    valid = torch.tensor([[True, True]])
    terms = agto_terms(mean_over_queries(layer, valid)[:, None], roles, valid, epsilon=1e-6)
    assert float(terms.enhance_B) == pytest.approx(-(math.log(0.3 / 4) + math.log(0.5 / 4)) / 2)
    assert float(terms.suppress_B) == pytest.approx(math.log(0.1 + 1e-6))
    assert terms.has_enhance_B.tolist() == terms.has_suppress_B.tolist() == [True]


def test_columns_for_the_log_and_filling_queries():
    layer = masses([[0.4, 0.2, 0.9]], [[0.2, 0.4, 0.05]]).requires_grad_()
    mean = mean_over_queries(
        layer * torch.tensor([1.0, 1.0, 0.0])[None, None, :, None], torch.tensor([[True, True, False]])
    )
    assert mean[0, 0, I].item() == pytest.approx(0.3)
    assert mean[0, 0, RATIO].item() == pytest.approx((2.0 + 0.5) / 2)
    assert mean[0, 0, SHARE].item() == pytest.approx((2 / 3 + 1 / 3) / 2)
    gradient = torch.autograd.grad(mean[0, 0, RATIO] + mean[0, 0, SHARE], layer, allow_unused=True)[0]
    assert gradient is None or not gradient.any()


def test_who_has_a_term():
    roles = torch.tensor([[S, I, R], [I, U, R], [S, U, R], [S, I, U]])
    valid = torch.tensor([[True], [True], [True], [False]])
    mean = torch.full((4, 1, 1, 7), 0.2)
    terms = agto_terms(mean, roles, valid)
    assert terms.has_enhance_B.tolist() == [True, True, False, False]
    assert terms.has_suppress_B.tolist() == [True, False, False, False]
    assert terms.enhance_B[2:].tolist() == [0, 0] and terms.suppress_B[1:].tolist() == [0, 0, 0]


def test_a_batch_is_the_sum_of_its_samples():
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(5, 2, 3, 7, generator=generator) * 0.2
    roles = torch.randint(0, 5, (5, 11), generator=generator)
    valid = torch.ones(5, 2, dtype=torch.bool)
    whole = agto_terms(mean, roles, valid)
    parts = [agto_terms(mean[i : i + 1], roles[i : i + 1], valid[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(whole.enhance_B, torch.cat([part.enhance_B for part in parts]))
    torch.testing.assert_close(whole.suppress_B, torch.cat([part.suppress_B for part in parts]))
    padded = torch.nn.functional.pad(roles, (3, 4), value=int(TokenRole.OTHER))
    torch.testing.assert_close(agto_terms(mean, padded, valid).enhance_B, whole.enhance_B)


@pytest.mark.parametrize(
    "options, image_moves, system_moves",
    [
        ({}, True, True),
        ({"image_target": 0.3}, False, True),  # the mass is 0.4: over the target
        ({"image_target": 0.5}, True, True),
        ({"system_floor": 0.2}, True, False),  # the mass is 0.1: under the floor
        ({"system_floor": 0.05}, True, True),
    ],
)
def test_targets_and_floors_stop_the_gradient(options, image_moves, system_moves):
    mean = torch.zeros(1, 1, 1, 7)
    mean[..., I], mean[..., S] = 0.4, 0.1
    mean.requires_grad_()
    terms = agto_terms(mean, torch.tensor([[S, I, R]]), torch.tensor([[True]]), **options)
    gradient = torch.autograd.grad(terms.enhance_B.sum() + terms.suppress_B.sum(), mean)[0]
    assert bool(gradient[..., I] < 0) == image_moves and bool(gradient[..., I] == 0) != image_moves
    assert bool(gradient[..., S] > 0) == system_moves and bool(gradient[..., S] == 0) != system_moves


def test_a_vanished_mass_is_finite():
    mean = torch.zeros(1, 1, 1, 7).requires_grad_()
    terms = agto_terms(mean, torch.tensor([[S, I, R]]), torch.tensor([[True]]), epsilon=0.0)
    (terms.enhance_B + terms.suppress_B).sum().backward()
    assert torch.isfinite(terms.enhance_B).all() and torch.isfinite(terms.suppress_B).all()
    assert torch.isfinite(mean.grad).all()


def test_schedule():
    assert [schedule(step, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [schedule(step, 2, (4, 8)) for step in (0, 1, 2, 4, 6, 8, 9)] == [0, 0.5, 1, 1, 0.5, 0, 0]
    assert schedule(10**6) == 1
