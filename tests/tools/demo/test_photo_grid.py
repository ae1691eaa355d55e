# SPDX-License-Identifier: Apache-2.0
"""The demo's data: answers by hand, disjoint splits, layouts that verl reads, a processor that resizes nothing."""

import re

import numpy as np
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from avar_verl.rewards.accuracy import extract_answer
from avar_verl.rewards.format import format_score
from avar_verl.tools.demo import photo_grid

NAMES = ["moon", "cat", "moon", "coins"]


@pytest.mark.parametrize(
    "kind, subject, places, answer",
    [
        ("what", "top right", ["top left", "bottom left", "bottom right", "top right"], "cat"),
        ("where", "cat", ["top left", "top right"], "top right"),
        ("count", "moon", ["top left", "top right", "bottom left", "bottom right"], "2"),
        ("same", "bottom left", ["bottom left", "top left"], "top left"),
    ],
)
def test_a_response_is_a_search_that_ends_where_the_answer_is(kind, subject, places, answer):
    response, got = photo_grid.response_text(kind, subject, NAMES)
    assert got == answer == extract_answer(response) and format_score(response) == 1
    looks = re.findall(
        r"(top left|top right|bottom left|bottom right) \[(\d+), (\d+), (\d+), (\d+)\] shows the (\w+)", response
    )
    assert [look[0] for look in looks] == places
    for place, *box, name in looks:
        assert tuple(map(int, box)) == photo_grid.PLACES[place]
        assert name == NAMES[photo_grid.PLACE_NAMES.index(place)]
    if kind == "count":
        assert re.findall(r"(\d) so far", response) == ["1", "1", "2", "2"]


def test_no_pixel_is_shared_between_the_splits():
    for photo in photo_grid.PHOTOS:
        seen = np.zeros(photo_grid.load_photo(photo.file).size, dtype=int)
        for split in photo_grid.SPLITS:
            left, top, right, bottom = photo.region(split)
            seen[left:right, top:bottom] += 1
        assert seen.max() == 1, photo.name
    regions = {photo.name: photo for photo in photo_grid.PHOTOS}
    for split in photo_grid.SPLITS:
        for sample in photo_grid.make_samples(14, 3, split):
            for crop in sample.crops:
                left, top, right, bottom = regions[crop.name].region(split)
                assert left <= crop.box[0] < crop.box[2] <= right and top <= crop.box[1] < crop.box[3] <= bottom


def test_samples_depend_on_their_arguments_alone():
    first, again = photo_grid.make_samples(7, 5, "train"), photo_grid.make_samples(9, 5, "train")
    for a, b in zip(first, again, strict=False):
        assert a.question == b.question and a.image.tobytes() == b.image.tobytes() and a.crops == b.crops
    other = photo_grid.make_samples(7, 6, "train")
    assert [a.image.tobytes() for a in first] != [a.image.tobytes() for a in other]
    assert [sample.kind for sample in first] == list(photo_grid.CYCLE)


def test_chance_is_the_best_constant_guess():
    samples = photo_grid.make_samples(1400, 0, "test")
    right = 0
    for kind in photo_grid.KINDS:
        answers = [sample.answer for sample in samples if sample.kind == kind]
        assert set(answers) <= set(photo_grid.answers_of(kind))
        if kind == "same":  # a guesser never names the place in question
            right += len(answers) / 3
        else:
            right += max(answers.count(answer) for answer in set(answers))
    # The most frequent of a finite sample is a little over its expectation.
    assert photo_grid.chance_level() <= right / 1400 <= photo_grid.chance_level() + 0.03


def test_verl_reads_both_layouts_and_nothing_is_resized(tmp_path, tiny_processor):
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

    photo_grid.make_sft_parquet(tmp_path / "sft.parquet", 3, 0)
    photo_grid.make_rl_parquet(tmp_path / "rl.parquet", 3, 0)
    config = OmegaConf.create({"pad_mode": "no_padding", "max_length": 512})
    row = MultiTurnSFTDataset(str(tmp_path / "sft.parquet"), tiny_processor.tokenizer, config, tiny_processor)[0]
    assert row["multi_modal_inputs"]["image_grid_thw"].tolist() == [[1, 8, 8]]
    record = pyarrow.parquet.read_table(tmp_path / "rl.parquet").to_pylist()[2]
    sample = photo_grid.make_samples(3, 0, "train")[2]
    assert record["prompt"] == [{"role": "user", "content": f"<image>{sample.question}"}]
    assert record["reward_model"]["ground_truth"] == sample.answer
    assert [tuple(crop["box"]) for crop in record["extra_info"]["crops"]] == [crop.box for crop in sample.crops]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 0, "train"), "n must be at least 1"),
        ((1, -1, "train"), "seed must not be negative"),
        ((1, 0, "val"), "split must be one of"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        photo_grid.make_samples(*arguments)
    with pytest.raises(ValueError, match="kind must be one of"):
        photo_grid.answers_of("why")


def test_a_missing_photograph_is_an_error():
    with pytest.raises(FileNotFoundError, match="scikit-image must carry nothing.png"):
        photo_grid.load_photo("nothing.png")
