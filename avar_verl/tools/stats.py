# SPDX-License-Identifier: Apache-2.0
"""Statistics of all tools: bootstrap intervals, accuracies, comparisons of two runs on the same items, correlations.

Intervals are percentile bootstrap intervals (Efron): as many samples as there are are drawn with replacement, the
statistic is computed from each draw, and the ends are the quantiles 0.025 and 0.975.

Shape suffixes: N = samples, D = draws, the first of which takes every sample once; X = anything
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL, QUANTILES = 0.95, (0.025, 0.975)


# ---- bootstrap ---------------------------------------------------------------------------------------------------


def draw(counts_N: np.ndarray, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """(D, N) how often each of N kinds is drawn; `counts_N`: number of samples of each kind."""
    total = counts_N.sum()
    return rng.multinomial(int(total), counts_N / total, size=num_draws)


def interval(value_DX: Any) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Ends of the interval, (X,) each, from all draws but the first; None if these are fewer than two.

    The ends are drawn values, without interpolation, because a ratio may be inf. A nan in a draw makes both ends nan.
    """
    drawn_DX = np.asarray(value_DX)[1:]
    if len(drawn_DX) < 2:
        return None, None
    sorted_DX, is_nan_X = np.sort(drawn_DX, axis=0), np.isnan(drawn_DX).any(0)
    at = [min(max(math.ceil(level * len(sorted_DX)) - 1, 0), len(sorted_DX) - 1) for level in QUANTILES]
    return np.where(is_nan_X, math.nan, sorted_DX[at[0]]), np.where(is_nan_X, math.nan, sorted_DX[at[1]])


def with_interval(value_DX: Any) -> dict[str, Any]:
    """`value`, `low` and `high` as numbers, or as nested lists in the shape of X; `low` and `high` may be None."""
    low, high = interval(value_DX)
    return {
        "value": value_DX[0].tolist(),
        "low": None if low is None else low.tolist(),
        "high": None if high is None else high.tolist(),
    }


@dataclass(frozen=True)
class Bootstrap:
    """Draws over any number of samples, shared by all statistics."""

    num_draws: int = 1000
    seed: int = 0

    def __post_init__(self):
        if self.num_draws < 100:
            raise ValueError(f"a bootstrap needs at least 100 draws; got {self.num_draws}. Use 1000.")

    def counts(self, num_samples: int) -> np.ndarray:
        """(D, N) float64, how often each sample is in each draw; D = 1 if there are fewer than two samples."""
        ones_N = np.ones(num_samples)
        drawn = draw(ones_N, self.num_draws, np.random.default_rng(self.seed)) if num_samples > 1 else []
        return np.array([ones_N, *drawn])


# ---- accuracies --------------------------------------------------------------------------------------------------


def standard_error(accuracy: float, n: int) -> float:
    """sqrt(p (1 - p) / n), the standard error of an accuracy."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def wilson(accuracy: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` samples, in [0, 1]; unlike the standard error, not empty at 0 and 1.

    >>> [round(end, 3) for end in wilson(0.0, 100)]
    [0.0, 0.037]
    """
    from scipy import stats  # Takes seconds to import.

    return tuple(stats.binomtest(round(accuracy * n), n).proportion_ci(method="wilson"))


def group_accuracy(correct: Sequence[bool], groups: Sequence[str]) -> float:
    """Fraction of groups whose items are all right.

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
    """Exact two-sided p-value of McNemar's test. Null hypothesis: of the items that only one run has right, each run
    has half.

    `p = min(1, 2 P[X <= min(a, b)])` for X binomial with a + b trials and probability 1/2; 1 without such items.

    >>> round(mcnemar(1, 5), 5)
    0.21875
    """
    from scipy.stats import binomtest  # Takes seconds to import, and most runs do not compare.

    trials = only_a + only_b
    return 1.0 if trials == 0 else float(binomtest(only_a, trials, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: with k p-values, the i-th smallest times k - i + 1, never less than the previous one, at most
    1.

    Calling adjusted values below 5 % significant has a chance of at most 5 % of any false positive.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = least
    return adjusted


def paired_bootstrap(
    differences: Mapping[str, Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `mean over tasks of the mean over the task's items`, resampling items within each
    task.

    Args:
        differences: by task, `correct_b - correct_a` of each item: the two runs stay paired.
    """
    if not differences or not all(len(values) for values in differences.values()):
        raise ValueError(f"a bootstrap needs items in every task; got {dict(differences)}. Leave empty tasks out.")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100; got {resamples}. 10000 give two digits of an interval.")
    rng = np.random.default_rng(seed)
    means_D = np.zeros(resamples + 1)
    for values in differences.values():
        # An item's difference is -1, 0 or 1, so a resample is three counts, with the same distribution.
        levels, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
        drawn = np.array([counts, *draw(counts, resamples, rng)])
        means_D += drawn @ levels / len(values)
    low, high = interval(means_D / len(differences))
    return float(low), float(high)


def compare(
    a: Mapping[str, Mapping[str, bool]], b: Mapping[str, Mapping[str, bool]], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Comparison]:
    """B against A, for every task and, under "mean", for the unweighted mean over the tasks (McNemar: over all items).

    Args:
        a, b: by task, whether each item (by id) is right.

    Raises:
        ValueError: tasks or items that only one of the runs has.
    """
    if not a or a.keys() != b.keys():
        raise ValueError(f"runs must have the same tasks; got {sorted(a)} and {sorted(b)}. Name those that both have.")
    out, differences, only = {}, {}, [0, 0]
    for task in a:
        if not a[task] or a[task].keys() != b[task].keys():
            extra = sorted(a[task].keys() ^ b[task].keys())
            raise ValueError(
                f"runs are compared on the same items; got {len(a[task])} and {len(b[task])} of {task}, {len(extra)} "
                f"of them in only one run, such as {extra[:3]}. Finish both runs with the same --n."
            )
        ids = list(a[task])
        right_a = np.array([a[task][i] for i in ids])
        right_b = np.array([b[task][i] for i in ids])
        differences[task] = right_b.astype(float) - right_a
        only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        only = [only[0] + only_a, only[1] + only_b]
        low, high = paired_bootstrap({task: differences[task]}, resamples, seed)
        mean_a, mean_b = float(right_a.mean()), float(right_b.mean())
        out[task] = Comparison(
            len(ids), mean_a, mean_b, mean_b - mean_a, low, high, only_a, only_b, mcnemar(only_a, only_b)
        )
    if len(out) > 1:
        low, high = paired_bootstrap(differences, resamples, seed)
        mean_a, mean_b = (float(np.mean([getattr(one, f"accuracy_{x}") for one in out.values()])) for x in "ab")
        n = sum(one.n for one in out.values())
        out["mean"] = Comparison(n, mean_a, mean_b, mean_b - mean_a, low, high, *only, mcnemar(*only))
    return out


# ---- correlations -------------------------------------------------------------------------------------------------


def correlate(x: Sequence[float], y: Sequence[float], bootstrap: Bootstrap) -> dict[str, Any]:
    """`pearson` and `spearman` with intervals over models, `num_models`, and `undefined`, the number of draws that were
    left out. The values are nan if x or y is constant or not finite.
    """
    x_N, y_N = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    drawn_DN = np.random.default_rng(bootstrap.seed).integers(len(x_N), size=(bootstrap.num_draws, len(x_N)))
    index_DN = np.concatenate([np.arange(len(x_N))[None], drawn_DN])
    out: dict[str, Any] = {"num_models": len(x_N)}
    for name, function in (("pearson", _pearson), ("spearman", _spearman)):
        value_D = function(x_N[index_DN], y_N[index_DN])
        defined_D = ~np.isnan(value_D[1:])
        out[name] = with_interval(np.concatenate([value_D[:1], value_D[1:][defined_D]]))
        out["undefined"] = int((~defined_D).sum())
    return out


def _pearson(x_DN: np.ndarray, y_DN: np.ndarray) -> np.ndarray:
    """(D,) correlation of every row; nan if a row is constant or not finite."""
    with np.errstate(all="ignore"):
        dx, dy = (values - values.mean(1, keepdims=True) for values in (x_DN, y_DN))
        # For a constant row this is not exactly 0, because of rounding.
        varies = (np.ptp(x_DN, axis=1) > 0) & (np.ptp(y_DN, axis=1) > 0)
        value = (dx * dy).sum(1) / np.sqrt((dx**2).sum(1) * (dy**2).sum(1))
    return np.where(varies, np.clip(value, -1, 1), np.nan)


def _spearman(x_DN: np.ndarray, y_DN: np.ndarray) -> np.ndarray:
    """(D,) correlation of the ranks of every row, ties at their mean; inf has the highest rank."""
    from scipy import stats  # Takes seconds to import.

    ranks = _pearson(stats.rankdata(x_DN, axis=1), stats.rankdata(y_DN, axis=1))
    return np.where(np.isnan(x_DN).any(1) | np.isnan(y_DN).any(1), np.nan, ranks)
