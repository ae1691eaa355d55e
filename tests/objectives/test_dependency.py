# SPDX-License-Identifier: Apache-2.0
"""Visual dependency by hand: the difference, the clip, the mean, the weights."""

import math

import pytest
import torch

from avar_verl.objectives.dependency import CLAMP, dependency_weights, mean_dependency, token_dependency

INF, NAN = math.inf, math.nan


def test_a_token_is_worth_what_the_image_adds_to_its_log_probability():
    with_image = torch.tensor([[-0.25, -1.0, -3.0], [-0.5, -7.0, -0.1]])
    without = torch.tensor([[-1.25, -1.0, -2.5], [-6.5, -0.5, -INF]])
    expected = [[1.0, 0.0, -0.5], [CLAMP, -CLAMP, CLAMP]]
    assert token_dependency(with_image, without).tolist() == expected
    assert CLAMP == 5.0


def test_the_mean_is_over_the_tokens_of_the_response():
    dependency = torch.tensor([[9.0, 1.0, 0.5, -3.0], [NAN, 2.0, NAN, NAN], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    first, second, third, fourth = mean_dependency(dependency, mask).tolist()
    assert (first, second, third) == (-0.5, 2.0, 0.0) and math.isnan(fourth)


def test_weights_have_mean_one_and_do_not_punish():
    """2, 0, 1, 1 over their mean of 1; 5 and 0 over 2.5; no token above 0, so all alike; no response."""
    dependency = torch.tensor(
        [[2.0, -1.0, 1.0, 1.0], [5.0, -5.0, NAN, 9.0], [0.0, -2.0, 0.0, 9.0], [3.0, 3.0, 3.0, 3.0]]
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    weights = dependency_weights(dependency, mask)
    assert weights.tolist() == [[2, 0, 1, 1], [2, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    generator = torch.Generator().manual_seed(0)
    dependency = torch.randn(5, 40, generator=generator)
    mask = torch.rand(5, 40, generator=generator) < 0.7
    weights = dependency_weights(dependency, mask)
    torch.testing.assert_close((weights * mask).sum(1), mask.sum(1).float())
    assert bool((weights >= 0).all()) and bool((weights[~mask] == 0).all())


def test_weights_of_what_is_not_a_number_are_refused():
    with pytest.raises(ValueError, match=r"log-probability of every response token; got nan at .* \[\[0, 1\]\]"):
        dependency_weights(torch.tensor([[1.0, NAN]]), torch.tensor([[1, 1]]))
