# SPDX-License-Identifier: Apache-2.0
"""Numbers of rollouts relative to their group: the rollouts of one prompt.

Shape suffixes: B = rollouts, N = groups
"""

from collections.abc import Hashable, Sequence

import torch


def group_index(groups: Sequence[Hashable]) -> torch.Tensor:
    """(B,) int64: groups numbered from 0 in the order of their first rollout.

    >>> group_index(["b", "a", "b"])
    tensor([0, 1, 0])
    """
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups], dtype=torch.int64)


def group_rank(x_B: torch.Tensor, group_B: torch.Tensor) -> torch.Tensor:
    """(B,) float32 in (0, 1]: rank of a rollout in its group, from 1, divided by the size of the group.

    Ties share the mean of their ranks. O(B log B).

    Args:
        x_B: finite.
        group_B: int64, from `group_index`.

    >>> group_rank(torch.tensor([8.0, 2.0, 8.0, 1.0]), torch.tensor([0, 0, 0, 1]))
    tensor([0.8333, 0.3333, 0.8333, 1.0000])
    """
    by_value_B = x_B.argsort(stable=True)
    order_B = by_value_B[group_B[by_value_B].argsort(stable=True)]
    _, tie_B, tie_sizes = torch.stack([group_B[order_B].double(), x_B[order_B].double()]).unique_consecutive(
        return_inverse=True, return_counts=True, dim=1
    )
    sizes_N = group_B.bincount()
    before_N = sizes_N.cumsum(0) - sizes_N
    # The mean rank of a tie that begins after `before` others is before + (size + 1) / 2.
    mean_rank_B = (tie_sizes.cumsum(0) - tie_sizes + (tie_sizes + 1) / 2)[tie_B] - before_N[group_B[order_B]]
    rank_B = torch.empty(len(x_B), dtype=torch.float32)
    rank_B[order_B] = (mean_rank_B / sizes_N[group_B[order_B]]).float()
    return rank_B


def group_normalize(x_B: torch.Tensor, group_B: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """(B,) float32: (x - mean) / (std + epsilon) over the group; x itself in a group of one.

    GRPO's normalisation as verl 0.9.1 computes it (trainer/ppo/core_algos.py:268 compute_grpo_outcome_advantage): std
    with Bessel's correction, epsilon 1e-6 outside the root. A group of equal x gives 0.

    Args:
        x_B: finite.
        group_B: int64, from `group_index`.
        epsilon: > 0, in the unit of x.

    >>> group_normalize(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0, 0, 0, 1]))
    tensor([-1.0000,  0.0000,  1.0000,  5.0000])
    """
    x_B = x_B.double()
    sizes_N = group_B.bincount()
    mean_N = torch.zeros(len(sizes_N), dtype=x_B.dtype).index_add_(0, group_B, x_B) / sizes_N
    centered_B = x_B - mean_N[group_B]
    squares_N = torch.zeros_like(mean_N).index_add_(0, group_B, centered_B.square())
    std_N = (squares_N / (sizes_N - 1).clamp(min=1)).sqrt()
    return torch.where(sizes_N[group_B] == 1, x_B, centered_B / (std_N[group_B] + epsilon)).float()
