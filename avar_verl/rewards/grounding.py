# SPDX-License-Identifier: Apache-2.0
"""Grounding reward: boxes of a response against reference boxes. Pure functions, no verl import."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

Box = Sequence[float]


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two (x1, y1, x2, y2) boxes, in [0, 1]; 0 if either is empty.

    >>> box_iou((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def grounding_score(predicted: Sequence[Box], reference: Sequence[Box], max_boxes: int = 64) -> float:
    """Sum of IoU over the best one-to-one matching, divided by the larger number of boxes, in [0, 1].

        max_{matching} sum_{(i, j)} IoU(p_i, r_j) / max(P, R)

    So a missing box costs as much as a superfluous one, and repeating a box that is right costs. Without a reference
    box the score is 1 if none is predicted, else 0.

    Args:
        predicted: P boxes (x1, y1, x2, y2); above `max_boxes` the first ones are matched, while all of them count in P.
        reference: R boxes in the same unit.

    Raises:
        ValueError: a reference box without area.

    Source: Hungarian matching of boxes as in DETR, arXiv 2005.12872; scipy's `linear_sum_assignment`.

    >>> grounding_score([(0, 0, 2, 2), (5, 5, 6, 6)], [(0, 0, 2, 2)])
    0.5
    """
    for box in reference:
        if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(
                f"a reference box must be (x1, y1, x2, y2) with positive area; got {tuple(box)}. Correct the data set."
            )
    if not reference or not predicted:
        return float(not reference and not predicted)
    iou_PR = np.array([[box_iou(p, r) for r in reference] for p in predicted[:max_boxes]])
    rows, columns = linear_sum_assignment(iou_PR, maximize=True)
    return float(iou_PR[rows, columns].sum() / max(len(predicted), len(reference)))
