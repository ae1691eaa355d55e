# SPDX-License-Identifier: Apache-2.0
"""Boxes and the image tokens in them, by hand-drawn grids."""

import pytest
import torch

from avar_verl.model.regions import grid_places, image_region, merged_grid_places, tokens_in_box

GRID = grid_places(4, 4)


def drawn(text: str) -> list[list[bool]]:
    return [[sign == "x" for sign in line] for line in text.split()]


@pytest.mark.parametrize(
    "box, expected",
    [
        ((0, 0, 112, 112), "xxxx xxxx xxxx xxxx"),
        ((56, 0, 112, 56), "..xx ..xx .... ...."),  # edges on the borders of tokens
        ((55, 0, 112, 57), ".xxx .xxx .xxx ...."),  # one pixel into the neighbours
        ((30, 90, 31, 91), ".... .... .... .x.."),
    ],
)
def test_tokens_that_a_box_touches(box, expected):
    assert tokens_in_box(box, (112, 112), GRID).reshape(4, 4).tolist() == drawn(expected)


def test_the_unit_of_the_box_does_not_matter():
    """The same region in pixels of a stored image of 448 x 224, in thousandths, and on a grid that is not square."""
    pixels = tokens_in_box((112, 0, 336, 112), (448, 224), grid_places(2, 4))
    assert pixels.reshape(2, 4).tolist() == drawn(".xx. ....")
    assert torch.equal(pixels, tokens_in_box((250, 0, 750, 500), (1000, 1000), grid_places(2, 4)))


def test_a_share_of_the_token():
    box = (0, 0, 42, 28)  # one token and half of the next
    assert tokens_in_box(box, (112, 112), GRID, min_overlap=0.5)[:4].tolist() == [True, True, False, False]
    assert tokens_in_box(box, (112, 112), GRID, min_overlap=0.51)[:4].tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    "box, overlap, message",
    [
        ((5, 5, 5, 9), 0.0, "a box must be .* with positive area inside the image"),
        ((0, 0, 113, 9), 0.0, "a box must be .* with positive area inside the image"),
        ((-1, 0, 9, 9), 0.0, "a box must be .* with positive area inside the image"),
        ((0, 0, 14, 14), 0.5, "must cover min_overlap of at least one token; got .* at most 0.25"),
    ],
)
def test_boxes_that_select_nothing_are_refused(box, overlap, message):
    with pytest.raises(ValueError, match=message):
        tokens_in_box(box, (112, 112), GRID, overlap)


def test_tiles_are_grids_of_their_own():
    """Two tiles side by side and a thumbnail, 1 x 2 tokens each: the right quarter of the image."""
    places = torch.cat([grid_places(1, 2, (0, 0, 0.5, 1)), grid_places(1, 2, (0.5, 0, 1, 1)), grid_places(1, 2)])
    assert tokens_in_box((75, 0, 100, 100), (100, 100), places).int().tolist() == [0, 0, 0, 1, 0, 1]


def test_placeholders_of_several_images():
    """Two images of 2 x 2 tokens: the right column of the first, all of the second, which has no boxes."""
    ids = torch.tensor([1, 9, 9, 9, 9, 1, 1, 9, 9, 9, 9, 1])
    places = merged_grid_places(torch.tensor([[1, 4, 4], [1, 4, 4]]), 2)
    region = image_region(ids, [9], [[(28, 0, 56, 56)], []], [(56, 56), (56, 56)], places)
    assert region.int().tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0]
    two = image_region(ids, [9], [[(28, 0, 56, 56), (0, 0, 10, 10)], []], [(56, 56), (56, 56)], places)
    assert two.int().tolist() == [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0]
    text = image_region(torch.tensor([1, 2]), [9], [], [], [])
    assert text.tolist() == [False, False]


@pytest.mark.parametrize(
    "boxes, grids, message",
    [
        ([], [[1, 4, 4]], "every image needs a list of boxes and a size; got 1 images, 0 lists"),
        ([[]], [[2, 4, 4]], "boxes refer to still images; got a grid of 2 frames"),
        ([[]], [[1, 4, 8]], "one placeholder for every image token; got 4 for places of 8"),
        ([[]], [[1, 8, 7]], r"the grid must be a multiple of the merge size; got \(8, 7\) and 2"),
    ],
)
def test_samples_that_do_not_fit_are_refused(boxes, grids, message):
    with pytest.raises(ValueError, match=message):
        places = merged_grid_places(torch.tensor(grids), 2)
        image_region(torch.tensor([9, 9, 9, 9]), [9], boxes, [(56, 56)], places)
