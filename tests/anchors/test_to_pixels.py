# SPDX-License-Identifier: Apache-2.0
"""Pixels by hand, for every system of coordinates."""

import pytest

from avar_verl.anchors import Anchor, parse_anchors, to_pixels
from avar_verl.anchors.formats import FORMATS

SIZE = (640, 480)
# Qwen2-VL tags in pixels: the second box alone would be 0-1000.
PIXELS = "<|box_start|>(1769,1013),(1778,1027)<|box_end|><|box_start|>(483,954),(519,987)<|box_end|>"


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


@pytest.mark.parametrize(
    ("text", "size", "scale"),
    [
        # Qwen2-VL tags in pixels: the second box alone would be 0-1000.
        (
            "<|box_start|>(1769,1013),(1778,1027)<|box_end|><|box_start|>(483,954),(519,987)<|box_end|>",
            None,
            "absolute",
        ),
        ("<|box_start|>(483,954),(519,987)<|box_end|>", None, "relative_1000"),
        ('{"bbox_2d": [10, 20, 300, 400]} {"bbox_2d": [100, 200, 900, 400]}', (640, 480), "relative_1000"),
        ('{"bbox_2d": [10, 20, 300, 400]} {"bbox_2d": [100, 200, 900, 400]}', (1000, 480), None),
        ('{"bbox_2d": [10, 20, 300, 400]} {"bbox_2d": [100, 200, 1900, 400]}', None, "absolute"),
        ('{"bbox_2d": [0.1, 0.2, 0.3, 0.4]} {"point_2d": [0.5, 0.5]}', (640, 480), "normalized"),
        ('{"bbox_2d": [10, 20, 300, 400]} <|box_start|>(483,954),(519,987)<|box_end|>', None, "relative_1000"),
        ('<points x1="10" y1="20">a</points> <points x1="310" y1="20">b</points>', None, "relative_1000"),
        ('<points x1="10" y1="20">a</points> <points x1="31" y1="20">b</points>', None, "percent"),
    ],
)
def test_one_scale_a_response(text, size, scale):
    anchors = parse_anchors(text, size)
    assert len(anchors) in (1, 2) and {anchor.scale for anchor in anchors} == {scale}


def test_boxes_that_are_read_together():
    assert to_pixels(parse_anchors(PIXELS, (1932, 1092))[1], (1932, 1092)) == (483, 954, 519, 987)


@pytest.mark.parametrize(
    ("box", "size", "coordinates", "found"),
    [
        ("[10, 20, 11, 40]", None, "absolute", 1),
        ("[10, 20, 10.9, 40]", None, "absolute", 0),
        ("[0.1, 0.2, 0.3, 0.4]", (640, 480), "absolute", 0),
        ("[500, 500, 502, 600]", (640, 480), "relative_1000", 1),  # 1.28 pixels
        ("[500, 500, 501, 600]", (640, 480), "relative_1000", 0),  # 0.64
        ("[500, 500, 501, 600]", None, "relative_1000", 1),
    ],
)
def test_nothing_below_a_pixel(box, size, coordinates, found):
    assert len(parse_anchors(f'{{"bbox_2d": {box}}}', size, coordinates)) == found


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
