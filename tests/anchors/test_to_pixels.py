# SPDX-License-Identifier: Apache-2.0
"""Pixels by hand, for every system of coordinates."""

import pytest

from avar_verl.anchors import Anchor, parse_anchors, to_pixels
from avar_verl.anchors.formats import FORMATS

SIZE = (640, 480)


@pytest.mark.parametrize(
    ("text", "coordinates", "expected"),
    [
        ('{"bbox_2d": [64, 48, 320, 240]}', "absolute", (64, 48, 320, 240)),
        ('{"bbox_2d": [100, 250, 500, 750]}', "relative_1000", (64, 120, 320, 360)),
        ('{"bbox_2d": [0.1, 0.25, 0.5, 0.75]}', "normalized", (64, 120, 320, 360)),
        ('{"bbox_2d": [0.1, 0.25, 0.5, 0.75]}', "auto", (64, 120, 320, 360)),
        ('{"bbox_2d": [10, 25, 50, 75]}', "percent", (64, 120, 320, 360)),
        ('{"bbox_2d": [64, 48, 650, 490]}', "absolute", (64, 48, 640, 480)),  # clipped
        ('{"point_2d": [500, 250]}', "relative_1000", (320, 120)),
        ('<point x="25.0" y="50.0">a</point>', "auto", (160, 240)),
        ('<points x1="250" y1="500">a</points>', "auto", (160, 240)),
        ('<point x="25" y="50">a</point>', "relative_1000", (16, 24)),
        ('<points coords="1 1 250 500">a</points>', "absolute", (160, 240)),
        ("<loc0256><loc0512><loc0768><loc1023> a", "absolute", (320, 120, 639.375, 360)),
        ('{"box_2d": [250, 100, 750, 500]}', "absolute", (64, 120, 320, 360)),
        # patch 33 is row 1, column 1; patch 66 is row 2, column 2
        ("<patch_index_0033><patch_index_0066>", "auto", (30, 22.5, 50, 37.5)),
        # one row: from the outer edge of column 1 to that of column 3
        ("<patch_index_0033><patch_index_0035>", "auto", (20, 15, 80, 30)),
        ("a fox [[097, 250, 500, 750]]", "auto", (62.08, 120, 320, 360)),
        ("<ref>a</ref><box>[[100, 250, 500, 750]]</box>", "absolute", (64, 120, 320, 360)),
        ("<ref>a</ref><box>(100,250),(500,750)</box>", "auto", (64, 120, 320, 360)),
        ("<ref>a</ref><box>(100,250),(500,450)</box>", "absolute", (100, 250, 500, 450)),
        ("<ref>a</ref><quad>(100,250),(500,300),(450,750),(120,700)</quad>", "auto", (64, 120, 320, 360)),
        ("<|det|>[[0, 333, 999, 999]]<|/det|>", "auto", (0, 160, 640, 480)),
        ("The dog[0.10,0.25,0.50,0.75] runs.", "absolute", (64, 120, 320, 360)),
    ],
)
def test_pixels(text, coordinates, expected):
    (anchor,) = parse_anchors(text)
    assert to_pixels(anchor, SIZE, coordinates) == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.scale is None])
def test_auto_does_not_guess(name):
    anchor = Anchor("bbox", 0, 1, (10.0, 20.0, 30.0, 40.0), format=name)
    with pytest.raises(ValueError, match="Pass coordinates='absolute'"):
        to_pixels(anchor, SIZE, "auto")


def test_rejections():
    (phrase,) = parse_anchors("The image shows a cat.")
    with pytest.raises(ValueError, match="a phrase has no coordinates"):
        to_pixels(phrase, SIZE, "absolute")
    box = Anchor("bbox", 0, 1, (10.0, 20.0, 30.0, 40.0), format="bbox_2d_json")
    with pytest.raises(ValueError, match="coordinates must be one of"):
        to_pixels(box, SIZE, "pixels")
    with pytest.raises(ValueError, match="image_size must be a positive"):
        to_pixels(box, (0, 10), "absolute")
