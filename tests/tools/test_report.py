# SPDX-License-Identifier: Apache-2.0
"""Numbers as text and pictures with attention on them."""

import base64

import numpy as np
import pytest
from PIL import Image

from avar_verl.tools.report import decode_image, number_text, overlay


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0.00"), (12.345, "12.35"), (1234.5, "1,234"), (173e6, "1.7e+08"), (1e-6, "1.0e-06"), (-2.5, "-2.50")],
)
def test_number_text(value, expected):
    assert number_text(value) == expected


def test_overlay_marks_the_place_of_the_most_attention():
    image = Image.new("RGB", (112, 112), (100, 100, 100))
    attention = np.zeros((4, 4))
    attention[0, 3] = 0.2
    pixels = np.asarray(overlay(image, attention.tolist())).astype(int)
    assert pixels[100, 10].tolist() == [100, 100, 100]
    red, green, blue = pixels[14, 98]
    assert red > 170 > 110 > green > blue
    assert np.array_equal(np.asarray(overlay(image, np.zeros((4, 4)).tolist())), np.asarray(image))


@pytest.mark.parametrize("encoded", ["not base64!", base64.b64encode(b"not an image").decode()])
def test_image_that_cannot_be_read_is_refused(encoded):
    with pytest.raises(ValueError, match="image of sample 0 must be a base64 image file"):
        decode_image(encoded, "sample 0")
