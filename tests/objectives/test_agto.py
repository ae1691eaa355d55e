# SPDX-License-Identifier: Apache-2.0
"""Guidance terms by hand, and what must not change them."""

import math

import pytest
import torch

from avar_verl.attention import attention_mass
from avar_verl.attention.capture import select_queries
from avar_verl.attention.mass import Visibility, selected_mass
from avar_verl.objectives.agto import RATIO, SHARE, agto_terms, eligible, mean_over_queries, schedule
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
    assert terms.enhance_B.item() == pytest.approx(-(math.log(0.3 / 4) + math.log(0.5 / 4)) / 2)
    assert terms.suppress_B.item() == pytest.approx(math.log(0.1 + 1e-6))
    assert terms.has_enhance_B.tolist() == terms.has_suppress_B.tolist() == [True]


def test_layers_and_heads_are_averaged_after_the_logarithm():
    """Layer means (0.2 and 0.4) and (0.1 and 0.8) over 2 keys: -[log 0.1 + log 0.2 + log 0.05 + log 0.4] / 4."""
    layers = [masses([[0.2], [0.4]], [[0.1], [0.1]]), masses([[0.1], [0.8]], [[0.1], [0.1]])]
    valid = torch.tensor([[True]])
    mean = torch.stack([mean_over_queries(layer, valid) for layer in layers], dim=1)
    terms = agto_terms(mean, torch.tensor([[S, I, I, R]]), valid)
    expected = -(math.log(0.1) + math.log(0.2) + math.log(0.05) + math.log(0.4)) / 4
    assert terms.enhance_B.item() == pytest.approx(expected)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2, 0.0])
def test_epsilon_stands_inside_the_logarithm_beside_the_mass_per_key(epsilon):
    """System mass 0.3 over 3 keys: log(0.1 + epsilon)."""
    mean = torch.zeros(1, 1, 1, 7)
    mean[..., I], mean[..., S] = 0.5, 0.3
    terms = agto_terms(mean, torch.tensor([[S, S, S, I]]), torch.tensor([[True]]), epsilon=epsilon)
    assert terms.suppress_B.item() == pytest.approx(math.log(0.1 + epsilon))


def test_columns_for_the_log_and_filling_queries():
    """Ratios 0.4/0.2 and 0.2/0.4, shares 2/3 and 1/3; the third query is filling, and its 0 / 0 is no nan."""
    layer = masses([[0.4, 0.2, 0.9]], [[0.2, 0.4, 0.05]]).requires_grad_()
    masked = layer * torch.tensor([1.0, 1.0, 0.0])[None, None, :, None]
    mean = mean_over_queries(masked, torch.tensor([[True, True, False]]))
    assert mean[0, 0, I].item() == pytest.approx(0.3)
    assert mean[0, 0, RATIO].item() == pytest.approx((2.0 + 0.5) / 2)
    assert mean[0, 0, SHARE].item() == pytest.approx((2 / 3 + 1 / 3) / 2)
    logged = mean[0, 0, RATIO] + mean[0, 0, SHARE]
    gradient = torch.autograd.grad(logged, layer, allow_unused=True, retain_graph=True)[0]
    assert gradient is None or not gradient.any()
    image_gradient = torch.autograd.grad(mean[0, 0, I], layer)[0]
    assert image_gradient[0, 0, :, I].tolist() == [0.5, 0.5, 0.0]


def test_a_sample_without_queries_has_means_of_zero():
    mean = mean_over_queries(torch.zeros(2, 3, 0, 5), torch.zeros(2, 0, dtype=torch.bool))
    assert mean.shape == (2, 3, 7) and not mean.any()


def test_who_has_a_term():
    roles = torch.tensor([[S, I, R], [I, U, R], [S, U, R], [S, I, U]])  # whole, no system, no image, no query
    valid = torch.tensor([[True], [True], [True], [False]])
    mean = torch.full((4, 1, 1, 7), 0.2)
    terms = agto_terms(mean, roles, valid)
    assert terms.has_enhance_B.tolist() == [True, True, False, False]
    assert terms.has_suppress_B.tolist() == [True, False, False, False]
    assert terms.enhance_B[2:].tolist() == [0, 0] and terms.suppress_B[1:].tolist() == [0, 0, 0]
    assert all(map(torch.equal, eligible(roles, valid), (terms.has_enhance_B, terms.has_suppress_B)))


def test_a_sample_without_a_term_gives_no_gradient_and_no_nan():
    mean = torch.zeros(3, 1, 1, 7)
    mean[0, ..., I], mean[0, ..., S] = 0.5, 0.2
    mean.requires_grad_()
    roles = torch.tensor([[S, I, R], [U, U, R], [S, U, R]])
    terms = agto_terms(mean, roles, torch.ones(3, 1, dtype=torch.bool))
    gradient = torch.autograd.grad(terms.enhance_B.sum() + terms.suppress_B.sum(), mean)[0]
    assert bool(gradient[0].any()) and not gradient[1:].any()


def random_batch(B=5, S_=11, H=4, K=2):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(B, H, S_, 6, generator=generator), torch.randn(B, K, S_, 6, generator=generator)
    roles = torch.randint(0, 5, (B, S_), generator=generator)
    roles[:, :4] = torch.tensor([S, I, U, R])  # everybody has a query that sees an image and a system turn
    return query, key, roles


def terms_of(query, key, roles, mask=None):
    """Guidance terms through the masses, as the engine computes them, of one layer and user queries."""
    positions, valid = select_queries(roles, TokenRole.USER)
    index = positions[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    visibility = Visibility(positions, key_mask_BS=mask)
    mass = selected_mass(query.gather(2, index), key, roles, visibility, valid)
    return agto_terms(mean_over_queries(mass, valid)[:, None], roles, valid)


def assert_same_terms(whole, parts):
    for name in ("enhance_B", "suppress_B"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_micro_batches_change_nothing(sizes):
    batch = random_batch()
    parts = [terms_of(*part) for part in zip(*(tensor.split(sizes) for tensor in batch), strict=True)]
    assert_same_terms(terms_of(*batch), parts)


@pytest.mark.parametrize("left, right", [(3, 0), (0, 4), (2, 5)])
def test_padding_changes_nothing(left, right):
    query, key, roles = random_batch()
    padded = [torch.nn.functional.pad(tensor, (0, 0, left, right), value=0.3) for tensor in (query, key)]
    mask = torch.nn.functional.pad(torch.ones_like(roles, dtype=torch.bool), (left, right))
    padded_roles = torch.nn.functional.pad(roles, (left, right), value=int(TokenRole.OTHER))
    assert_same_terms(terms_of(query, key, roles), [terms_of(*padded, padded_roles, mask)])


def test_packing_changes_nothing():
    """Two samples in one row: the masses of each are those it has by itself, and the terms are functions of these."""
    query, key, roles = random_batch(B=2)
    whole = terms_of(query, key, roles)
    row = [tensor.transpose(0, 1).flatten(1, 2)[None] for tensor in (query, key)]
    segments = torch.arange(2).repeat_interleave(roles.shape[1])[None]
    mass = attention_mass(*row, roles.reshape(1, -1), segment_ids=segments)
    parts = []
    for sample in range(2):
        positions = (roles[sample] == TokenRole.USER).nonzero()[:, 0] + sample * roles.shape[1]
        valid = torch.ones(1, len(positions), dtype=torch.bool)
        mean = mean_over_queries(mass[:, :, positions], valid)
        parts.append(agto_terms(mean[:, None], roles[sample : sample + 1], valid))
    assert_same_terms(whole, parts)


@pytest.mark.parametrize(
    "options, image_moves, system_moves",
    [
        ({}, True, True),
        ({"image_target": 0.3}, False, True),  # the mass is 0.4: over the target
        ({"image_target": 0.5}, True, True),
        ({"system_floor": 0.2}, True, False),  # the mass is 0.1: under the floor
        ({"system_floor": 0.05}, True, True),
        ({"image_target": 0.3, "system_floor": 0.2}, False, False),
    ],
)
def test_targets_and_floors_stop_the_gradient(options, image_moves, system_moves):
    mean = torch.zeros(1, 1, 1, 7)
    mean[..., I], mean[..., S] = 0.4, 0.1
    mean.requires_grad_()
    terms = agto_terms(mean, torch.tensor([[S, I, R]]), torch.tensor([[True]]), **options)
    gradient = torch.autograd.grad(terms.enhance_B.sum() + terms.suppress_B.sum(), mean)[0]
    # d(-log m) / dm = -1 / 0.4, d log(m + e) / dm = 1 / (0.1 + 1e-6), or exactly nothing
    assert gradient[..., I].item() == (pytest.approx(-2.5) if image_moves else 0)
    assert gradient[..., S].item() == (pytest.approx(10, rel=1e-4) if system_moves else 0)


def test_every_head_stops_by_itself():
    mean = torch.zeros(1, 1, 2, 7)
    mean[..., I] = torch.tensor([0.2, 0.6])
    mean.requires_grad_()
    terms = agto_terms(mean, torch.tensor([[S, I, R]]), torch.tensor([[True]]), image_target=0.5)
    # a head over the target counts as at the target: -(log 0.2 + log 0.5) / 2
    assert terms.enhance_B.item() == pytest.approx(-(math.log(0.2) + math.log(0.5)) / 2)
    gradient = torch.autograd.grad(terms.enhance_B.sum(), mean)[0][0, 0, :, I]
    assert gradient.tolist() == [pytest.approx(-1 / 0.2 / 2), 0]


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39])
@pytest.mark.parametrize("num_image", [1, 2000])
def test_a_vanished_mass_is_finite(value, num_image):
    mean = torch.full((1, 1, 1, 7), value).requires_grad_()
    roles = torch.tensor([[S, *[I] * num_image, R]])
    terms = agto_terms(mean, roles, torch.tensor([[True]]), epsilon=0.0)
    (terms.enhance_B + terms.suppress_B).sum().backward()
    assert torch.isfinite(terms.enhance_B).all() and torch.isfinite(terms.suppress_B).all()
    assert torch.isfinite(mean.grad).all()


def test_schedule():
    assert [schedule(step, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [schedule(step, 2, (4, 8)) for step in (0, 1, 2, 4, 6, 8, 9)] == [0, 0.5, 1, 1, 0.5, 0, 0]
    assert [schedule(step, 4, (4, 5)) for step in (3, 4, 5)] == [0.75, 1, 0]  # warm-up meets annealing
    assert [schedule(step, anneal=(0, 2)) for step in range(4)] == [1, 0.5, 0, 0]
    assert [schedule(step, 1) for step in range(2)] == [0, 1]
    assert schedule(0) == schedule(10**6) == 1


def test_layer_weights_are_normalised():
    """Two layers with image masses 0.5 and 0.25 over one image token, weighted 3 to 1: ln 2 * (3 * 1 + 1 * 2) / 4."""
    mean = torch.zeros(1, 2, 1, 7)
    mean[0, :, 0, I] = torch.tensor([0.5, 0.25])
    mean[0, :, 0, S] = 0.125
    roles, valid = torch.tensor([[S, I, R]]), torch.tensor([[True]])
    weighted = agto_terms(mean, roles, valid, epsilon=0.0, layer_weights=(3.0, 1.0))
    assert weighted.enhance_B.item() == pytest.approx(math.log(2) * 1.25)
    assert weighted.suppress_B.item() == pytest.approx(-3 * math.log(2))
    alike = agto_terms(mean, roles, valid, epsilon=0.0, layer_weights=(2.0, 2.0))
    assert alike.enhance_B.item() == pytest.approx(agto_terms(mean, roles, valid, epsilon=0.0).enhance_B.item())
