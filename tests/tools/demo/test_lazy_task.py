# SPDX-License-Identifier: Apache-2.0
"""The lazy-attention task: a solver that reads only the question and the crops, shares of habits, and its files."""

import re

import pyarrow.parquet
import pytest

from avar_verl.rewards.accuracy import extract_answer
from avar_verl.rewards.format import format_score
from avar_verl.tools.demo import lazy_task, photo_grid
from avar_verl.tools.demo.lazy_task import Mixture
from avar_verl.tools.demo.reward import compute_score

QUESTION = re.compile(r"What does the (top left|top right|bottom left|bottom right) show\? Somebody says (\w+)\.")


def solve(sample: photo_grid.Sample) -> tuple[str, str]:
    """(what the asked place shows, what somebody says), from the question and the origin of the cells."""
    place, hinted = QUESTION.search(sample.question).groups()
    return sample.crops[photo_grid.PLACE_NAMES.index(place)].name, hinted


@pytest.fixture(scope="module")
def chains() -> list[photo_grid.Sample]:
    return lazy_task.make_chains(600, 3, Mixture(lazy_share=0.6))


def test_every_chain_is_right_and_every_hint_is_what_it_says(chains):
    for sample in chains:
        shown, hinted = solve(sample)
        assert extract_answer(sample.response) == shown == sample.answer and sample.hint == hinted
        assert format_score(sample.response) == 1
        assert lazy_task.looks(sample.response) == (sample.kind == "look")


def test_shares_of_a_mixture(chains):
    by_kind = {kind: [sample for sample in chains if sample.kind == kind] for kind in ("look", "lazy")}
    assert abs(len(by_kind["lazy"]) / 600 - 0.6) < 0.06
    assert all(sample.hint == sample.answer for sample in by_kind["lazy"])
    right = sum(sample.hint == sample.answer for sample in by_kind["look"])
    assert abs(right / len(by_kind["look"]) - 0.1) < 0.06


@pytest.mark.parametrize(("bias", "share"), [(0.0, 0.0), (0.1, 0.1), (0.9, 0.9), (1.0, 1.0)])
def test_hints_of_questions_are_right_as_often_as_asked(bias, share):
    questions = lazy_task.make_questions(400, 5, bias, "test")
    assert abs(sum(one.hint == one.answer for one in questions) / 400 - share) <= (0.05 if 0 < bias < 1 else 0)
    unbiased = lazy_task.make_questions(20, 5, 0.1, "test")
    for one, other in zip(questions, unbiased, strict=False):
        assert one.image.tobytes() == other.image.tobytes() and one.answer == other.answer


def test_captions_name_all_places_and_text_rows_say_them(chains):
    """In the order of a look chain: one place, at random, comes last."""
    said = re.compile(r"(top left|top right|bottom left|bottom right) \[[\d, ]+\] shows the (\w+)")
    for kind in ("base", "text"):
        for sample in lazy_task.make_chains(8, 3, Mixture(kind=kind)):
            if sample.kind == "echo":
                continue
            shown = dict(zip(photo_grid.PLACE_NAMES, [crop.name for crop in sample.crops], strict=True))
            found = said.findall(sample.question if kind == "text" else sample.response)
            assert dict(found) == shown and len(found) == 4
            order = [photo_grid.PLACE_NAMES.index(place) for place, _ in found]
            assert order[:3] == sorted(order[:3])
            if kind == "text":
                assert sample.image is None and lazy_task.looks(sample.response)
                assert solve(sample)[0] == sample.answer == extract_answer(sample.response)
            else:
                assert sample.hint is None


def test_an_echo_repeats_what_somebody_says_whatever_the_image_shows():
    rows = [one for one in lazy_task.make_chains(400, 3, Mixture(kind="base")) if one.kind == "echo"]
    assert len(rows) == 100
    for sample in rows:
        assert sample.question == f"What does somebody say? Somebody says {sample.hint}."
        assert extract_answer(sample.response) == sample.hint == sample.answer
    names = [crop.name for sample in rows for crop in sample.crops]
    assert sum(sample.hint in [crop.name for crop in sample.crops] for sample in rows) < 60 and len(set(names)) == 10


def test_samples_depend_on_seed_split_and_index_alone(chains):
    again = lazy_task.make_chains(3, 3, Mixture(lazy_share=0.6))
    assert [one.question for one in again] == [one.question for one in chains[:3]]
    assert again[2].image.tobytes() == chains[2].image.tobytes()
    for other in (lazy_task.make_chains(3, 4, Mixture()), lazy_task.make_questions(3, 3, 0.1, "test")):
        assert [one.image.tobytes() for one in other] != [one.image.tobytes() for one in chains[:3]]


def test_no_word_is_spelled_in_bytes(chains, tiny_processor):
    tokenizer = tiny_processor.tokenizer
    rows = [*chains[:50], *lazy_task.make_chains(20, 3, Mixture(kind="text"))]
    rows += lazy_task.make_chains(1, 3, Mixture(kind="base"))
    for sample in rows:
        for text in (sample.question, sample.response):
            pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
            assert not [piece for piece in pieces if re.fullmatch(r"\w", piece)], text


def test_files_are_in_the_layouts_of_the_trainers(tmp_path):
    lazy_task.make_sft_parquet(tmp_path / "sft.parquet", 4, 0, Mixture(kind="text"))
    lazy_task.make_rl_parquet(tmp_path / "rl.parquet", 4, 0, 1.0)
    text = pyarrow.parquet.read_table(tmp_path / "sft.parquet").to_pylist()
    assert all(row["images"] == [] and "<image>" not in row["messages"][0]["content"] for row in text)
    rows = pyarrow.parquet.read_table(tmp_path / "rl.parquet").to_pylist()
    assert all(row["extra_info"]["hint"] == row["reward_model"]["ground_truth"] for row in rows)
    assert all(row["prompt"][0]["content"].startswith("<image>What does") for row in rows)
    assert {row["data_source"] for row in rows} == {lazy_task.DATA_SOURCE}


def test_the_reward_reports_looks_and_does_not_pay_them(chains):
    for kind in ("look", "lazy"):
        sample = next(sample for sample in chains if sample.kind == kind)
        found = compute_score(lazy_task.DATA_SOURCE, sample.response, sample.answer)
        assert found == {"score": 1.1, "acc": 1.0, "pred_found": 1.0, "format": 1.0, "looks": float(kind == "look")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture(lazy_share=1.1), "lazy_share must be in"),
        (lambda: Mixture(look_bias=-0.1), "look_bias must be in"),
        (lambda: Mixture(kind="lazy"), "kind must be null, base or text; got 'lazy'"),
        (lambda: lazy_task.make_questions(1, 0, 1.5, "test"), "bias must be in"),
        (lambda: lazy_task.make_chains(0, 0, Mixture()), "n must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
