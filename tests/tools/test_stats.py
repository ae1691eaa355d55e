# SPDX-License-Identifier: Apache-2.0
"""Numbers computed by hand."""

from itertools import product

import numpy as np
import pytest

from avar_verl.tools.stats import compare, group_accuracy, holm, mcnemar, paired_bootstrap, standard_error


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(1, 5) == pytest.approx(14 / 64)  # 2 (C(6,0) + C(6,1)) / 2^6
    assert mcnemar(5, 1) == mcnemar(1, 5)
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_standard_error_and_groups():
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 10) == 0
    assert group_accuracy([True, True, False, True, True], ["a", "a", "b", "b", "c"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="needs items"):
        group_accuracy([], [])


def test_bootstrap_of_two_items_is_the_enumerated_distribution():
    # Means of the four equally likely resamples of (1, 0): 0, 1/2, 1/2, 1. Their 2.5 and 97.5 % quantiles are 0 and 1.
    assert paired_bootstrap({"a": [1.0, 0.0]}) == (0.0, 1.0)
    # Without variation there is no width.
    assert paired_bootstrap({"a": [1.0, 1.0], "b": [0.0]}) == (0.5, 0.5)


def test_bootstrap_agrees_with_enumeration_over_all_resamples():
    values = np.array([1.0, 1.0, 0.0, -1.0, 1.0])
    means = [np.mean(values[list(indices)]) for indices in product(range(5), repeat=5)]
    low, high = np.quantile(means, [0.025, 0.975])
    found = paired_bootstrap({"a": values}, resamples=200_000)
    assert found == pytest.approx((low, high), abs=1e-9)  # Both are multiples of 1/5.


def test_bootstrap_keeps_tasks_apart():
    # Resampled together, the mean would move; task by task every resample has the same one.
    assert paired_bootstrap({"a": [1.0] * 5, "b": [-1.0] * 50}) == (0.0, 0.0)


def test_bootstrap_refuses_nothing():
    with pytest.raises(ValueError, match="needs items in every task"):
        paired_bootstrap({"a": []})
    with pytest.raises(ValueError, match="resamples must be at least 100; got 10"):
        paired_bootstrap({"a": [1.0]}, resamples=10)


def _run(task_bits: dict[str, str]) -> dict[str, dict[str, bool]]:
    return {task: {str(i): bit == "1" for i, bit in enumerate(bits)} for task, bits in task_bits.items()}


def test_compare_counts_pairs():
    rows = compare(_run({"x": "1100000", "y": "10"}), _run({"x": "0111110", "y": "11"}))
    x = rows["x"]
    assert (x.n, x.only_a, x.only_b) == (7, 1, 4)
    assert x.accuracy_a == pytest.approx(2 / 7) and x.accuracy_b == pytest.approx(5 / 7)
    assert x.difference == pytest.approx(3 / 7)
    assert x.p_value == pytest.approx(2 * (1 + 5) / 32)
    assert x.low <= x.difference <= x.high
    mean = rows["mean"]  # Of tasks, not of items.
    assert mean.accuracy_a == pytest.approx((2 / 7 + 1 / 2) / 2) and mean.accuracy_b == pytest.approx((5 / 7 + 1) / 2)
    assert (mean.n, mean.only_a, mean.only_b) == (9, 1, 5)
    assert mean.p_value == pytest.approx(14 / 64)
    assert "mean" not in compare(_run({"x": "1"}), _run({"x": "0"}))


def test_compare_is_paired():
    """The same accuracies, so the same unpaired interval; what differs is which items are right."""
    same = compare(_run({"x": "1" * 50 + "0" * 50}), _run({"x": "1" * 50 + "0" * 50}))["x"]
    opposite = compare(_run({"x": "1" * 50 + "0" * 50}), _run({"x": "0" * 50 + "1" * 50}))["x"]
    assert (same.low, same.high, same.difference, opposite.difference) == (0, 0, 0, 0)
    assert opposite.low < -0.1 and opposite.high > 0.1


def test_compare_refuses_other_items():
    with pytest.raises(ValueError, match="must have the same tasks"):
        compare(_run({"x": "1"}), _run({"y": "1"}))
    with pytest.raises(ValueError, match="got 2 and 3 of x, 1 of them in only one run, such as \\['2'\\]"):
        compare(_run({"x": "10"}), _run({"x": "100"}))
