# SPDX-License-Identifier: Apache-2.0
"""Partners by hand, and of rows of real images."""

import pytest

from avar_verl.data.rows import Row
from avar_verl.tools.demo import photo_grid
from avar_verl.tools.vas.partners import Job, Looks, jobs, looks_of, partners_of


def looks(text: str) -> list[Looks | None]:
    """`a` and `b` are pictures of one shape, `X` and `Y` of another; `-` is a row without an image."""
    return [None if letter == "-" else Looks("square" if letter.islower() else "wide", letter) for letter in text]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("ab", {0: 1, 1: 0}),
        ("abc", {0: 1, 1: 2, 2: 0}),
        ("aab", {0: 2, 1: 2, 2: 0}),
        ("abb", {0: 1, 1: 0, 2: 0}),
        ("aba", {0: 1, 1: 2, 2: 1}),  # The first row has the pixels of the last one.
        ("aXbY", {0: 2, 1: 3, 2: 0, 3: 1}),
        ("-a-b-", {1: 3, 3: 1}),
        ("aXa", {0: None, 1: None, 2: None}),
        ("--", {}),
        ("", {}),
    ],
)
def test_by_hand(text, expected):
    assert partners_of(looks(text)) == expected


@pytest.mark.parametrize("text", ["abcabc", "aabXbYa", "abXXYab-", "aaab"])
def test_a_partner_does_not_depend_on_how_many_rows_are_measured(text):
    whole = partners_of(looks(text))
    for n in range(1, len(text) + 1):
        assert partners_of(looks(text), n) == {index: at for index, at in whole.items() if index < n}


def test_no_more_rows_are_read_than_needed():
    read = iter(looks("aabXabab"))
    assert partners_of(read, 2) == {0: 2, 1: 2}
    assert len(list(read)) == 4  # The row behind the last partner was looked at.


def rows_of(text: str) -> list[Row]:
    return [Row("file", index, {"letter": letter}, index) for index, letter in enumerate(text)]


@pytest.mark.parametrize("text", ["abc", "aabXbYa", "-ab-", "abab"])
def test_every_wanted_row_comes_once_with_its_partner(text):
    rows, partners = rows_of(text), partners_of(looks(text))
    partners = {index: partner for index, partner in partners.items() if partner is not None}
    for wanted in (set(range(len(text))), {0, len(text) - 1}, set()):
        made = list(jobs(rows, partners, lambda row, wanted=wanted: row.index in wanted))
        assert sorted(job.row.index for job in made) == sorted(wanted)
        for job in made:
            partner = partners.get(job.row.index)
            assert job == Job(rows[job.row.index], None if partner is None else rows[partner])


def test_images_of_rows(tiny_processor):
    """A picture again under another question is the same picture; a wide one has another shape."""
    first, second = (sample.image for sample in photo_grid.make_samples(2, 0, "test"))
    wide = second.resize((2 * second.width, second.height))
    rows = [{"question": "A?", "image": first}, {"question": "B?", "image": first}, {"question": "C?"},
            {"question": "D?", "image": second}, {"question": "E?", "image": wide}]  # fmt: skip
    found = list(looks_of([Row("file", at, row, at) for at, row in enumerate(rows)], tiny_processor, 14))
    assert found[0] == found[1] and found[2] is None
    assert found[3].shape == found[0].shape != found[4].shape and found[3].pixels != found[0].pixels
    assert partners_of(found) == {0: 3, 1: 3, 3: 0, 4: None}
    with pytest.raises(ValueError, match="row 7 of file: a row must have one of the columns"):
        list(looks_of([Row("file", 7, {}, 0)], tiny_processor, 14))
