# SPDX-License-Identifier: Apache-2.0
"""Accuracy, and comparisons of two runs on the same items. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


def standard_error(accuracy: float, n: int) -> float:
    """sqrt(p (1 - p) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def group_accuracy(correct: Sequence[bool], groups: Sequence[str]) -> float:
    """Share of the groups all of whose items are right.

    >>> group_accuracy([True, False, True], ["a", "a", "b"])
    0.5
    """
    whole: dict[str, bool] = {}
    for right, group in zip(correct, groups, strict=True):
        whole[group] = whole.get(group, True) and right
    if not whole:
        raise ValueError("group_accuracy needs items; got none. Ask for one or more.")
    return sum(whole.values()) / len(whole)


@dataclass(frozen=True)
class Comparison:
    """B against A on the same items. Differences are in accuracy, from -1 to 1, positive if B is better."""

    n: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p_value: float


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of McNemar's test: of the items that one run alone has right, half would be each one's.

    `p = min(1, 2 P[X <= min(a, b)])` for X binomial with a + b trials and probability 1/2; 1 without such items.

    >>> round(mcnemar(1, 5), 5)
    0.21875
    """
    from scipy.stats import binomtest  # Takes seconds to import, and a run does not compare.

    trials = only_a + only_b
    return 1.0 if trials == 0 else float(binomtest(only_a, trials, 0.5).pvalue)


def bootstrap(
    differences: Mapping[str, Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `mean over tasks of the mean over the task's items`, items resampled in each.

    Args:
        differences: by task, `correct_b - correct_a` of each item: the two runs stay paired.
    """
    if not differences or not all(len(values) for values in differences.values()):
        raise ValueError(f"bootstrap needs items in every task; got {dict(differences)}. Leave empty tasks out.")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100; got {resamples}. 10000 give two digits of an interval.")
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in differences.values():
        values = np.asarray(values, dtype=float)
        # An item's difference is -1, 0 or 1, so a resample is three counts: the same distribution without n draws.
        levels, counts = np.unique(values, return_counts=True)
        drawn = rng.multinomial(len(values), counts / len(values), size=resamples)
        means += drawn @ levels / len(values)
    low, high = np.quantile(means / len(differences), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def compare(
    a: Mapping[str, Mapping[str, bool]], b: Mapping[str, Mapping[str, bool]], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Comparison]:
    """B against A, for every task and, under "mean", for the unweighted mean over the tasks (McNemar: over all items).

    Args:
        a, b: by task, whether each item (by id) is right.

    Raises:
        ValueError: tasks or items that only one of them has.
    """
    if not a or a.keys() != b.keys():
        raise ValueError(f"runs must have the same tasks; got {sorted(a)} and {sorted(b)}. Name those that both have.")
    out, differences, only = {}, {}, [0, 0]
    for task in a:
        if not a[task] or a[task].keys() != b[task].keys():
            extra = sorted(a[task].keys() ^ b[task].keys())
            raise ValueError(
                f"runs are compared on the same items; got {len(a[task])} and {len(b[task])} of {task}, {len(extra)} "
                f"of them in one run alone, such as {extra[:3]}. Finish both runs with the same --n."
            )
        ids = list(a[task])
        right_a = np.array([a[task][i] for i in ids])
        right_b = np.array([b[task][i] for i in ids])
        differences[task] = right_b.astype(float) - right_a
        only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        only = [only[0] + only_a, only[1] + only_b]
        low, high = bootstrap({task: differences[task]}, resamples, seed)
        mean_a, mean_b = float(right_a.mean()), float(right_b.mean())
        out[task] = Comparison(
            len(ids), mean_a, mean_b, mean_b - mean_a, low, high, only_a, only_b, mcnemar(only_a, only_b)
        )
    if len(out) > 1:
        low, high = bootstrap(differences, resamples, seed)
        mean_a, mean_b = (float(np.mean([getattr(one, f"accuracy_{x}") for one in out.values()])) for x in "ab")
        n = sum(one.n for one in out.values())
        out["mean"] = Comparison(n, mean_a, mean_b, mean_b - mean_a, low, high, *only, mcnemar(*only))
    return out
