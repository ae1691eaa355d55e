# SPDX-License-Identifier: Apache-2.0
"""Boxes against reference boxes, by hand."""

import itertools
import random

import pytest

from avar_verl.rewards.grounding import box_iou, grounding_score

UNIT = (0, 0, 2, 2)
FAR = (10, 10, 12, 12)


@pytest.mark.parametrize(
    "a, b, iou",
    [
        (UNIT, UNIT, 1.0),
        (UNIT, (1, 0, 3, 2), 2 / 6),
        (UNIT, (1, 1, 3, 3), 1 / 7),
        (UNIT, (2, 0, 4, 2), 0.0),  # they touch
        (UNIT, FAR, 0.0),
        ((0, 0, 4, 4), (1, 1, 2, 3), 2 / 16),
    ],
)
def test_iou_by_hand(a, b, iou):
    assert box_iou(a, b) == pytest.approx(iou) == box_iou(b, a)


@pytest.mark.parametrize(
    "predicted, reference, score",
    [
        ([], [], 1.0),
        ([UNIT], [], 0.0),
        ([], [UNIT], 0.0),
        ([UNIT], [UNIT], 1.0),
        ([UNIT, UNIT], [UNIT], 1 / 2),  # repeating costs
        ([UNIT], [UNIT, FAR], 1 / 2),  # missing one costs the same
        ([FAR, UNIT], [UNIT, FAR], 1.0),  # order does not matter
        ([(1, 0, 3, 2), FAR], [UNIT, FAR], (1 / 3 + 1) / 2),
    ],
)
def test_score_by_hand(predicted, reference, score):
    assert grounding_score(predicted, reference) == pytest.approx(score)


def test_matching_is_the_best_one_and_not_the_greedy_one():
    """The first box fits both references; the second one fits only the first reference."""
    predicted = [(0, 0, 10, 10), (0, 0, 10, 6)]
    reference = [(0, 0, 10, 9), (0, 0, 10, 12)]
    by_hand = max(
        sum(box_iou(p, r) for p, r in zip(predicted, order, strict=True)) / 2
        for order in itertools.permutations(reference)
    )
    assert grounding_score(predicted, reference) == pytest.approx(by_hand)
    greedy = (box_iou(predicted[0], reference[0]) + box_iou(predicted[1], reference[1])) / 2
    assert by_hand > greedy


def test_bounds_and_a_flood_of_boxes():
    generator = random.Random(0)
    for _ in range(50):
        boxes = [
            (x, y, x + 1 + generator.random(), y + 1 + generator.random())
            for x, y in [(generator.random() * 5, generator.random() * 5) for _ in range(generator.randint(1, 6))]
        ]
        assert 0 <= grounding_score(boxes, boxes[:2]) <= 1
    assert grounding_score([UNIT] * 100_000, [UNIT]) == pytest.approx(1e-5)


@pytest.mark.parametrize("box", [(0, 0, 0, 2), (2, 0, 1, 1), (0, 0, 1)])
def test_reference_boxes_without_area_are_refused(box):
    with pytest.raises(ValueError, match="a reference box must be .* with positive area; got"):
        grounding_score([UNIT], [box])
