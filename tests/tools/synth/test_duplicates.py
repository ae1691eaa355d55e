# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from avar_verl.tools.synth.duplicates import NearDuplicates, Overlap, minhash, same_pictures, write_hashes
from avar_verl.tools.synth.items import Item, Picture

WORDS = "the top left of the picture shows a cat on a bench and the top right shows a rocket on its way up to the sky"


def picture(pixels: str, dhash: int = 0) -> Picture:
    return Picture(b"data", "image/png", 10, 10, pixels, dhash)


def item(row: int = 0, *pictures: Picture, question: str = "<image>What is this?") -> Item:
    return Item("a.parquet", row, question, ("cat",), pictures or (picture("p"),))


def test_same_pictures():
    assert same_pictures((picture("p", 0),), (picture("p", 2**64 - 1),), 0)  # the same pixels
    assert same_pictures((picture("p", 0b0111),), (picture("q", 0b1000),), 4)
    assert not same_pictures((picture("p", 0b01111),), (picture("q", 0b10000),), 4)
    assert not same_pictures((picture("p"),), (picture("p"), picture("p")), 64)


def test_minhash_estimates_jaccard():
    words = WORDS.split()
    other = words[:12] + ["dog"] + words[13:]
    shingles = [{" ".join(w[i : i + 3]) for i in range(len(w) - 2)} for w in (words, other)]
    exact = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    assert minhash(" ".join(words)).jaccard(minhash(" ".join(other))) == pytest.approx(exact, abs=0.12)
    assert minhash("A, b. c!").jaccard(minhash("a b C")) == 1.0
    assert minhash("").jaccard(minhash("")) == 1.0


def test_near_duplicates_have_words_and_picture_in_common():
    near = NearDuplicates(0.8, 4)
    assert near.find(item(0), WORDS) == ""
    assert near.find(item(1), WORDS.replace("sky", "stars")) == "a.parquet row 0"
    assert near.find(item(2, picture("other", 0xFF)), WORDS) == ""  # another picture
    assert near.find(item(3), "something entirely different is said about this one here") == ""
    assert near.find(item(4, picture("scaled", 0xFE)), WORDS) == "a.parquet row 2"


def test_a_rejected_one_rejects_nobody():
    near = NearDuplicates(0.8, 4)
    near.find(item(0), WORDS)
    near.find(item(1), WORDS)
    assert set(near.kept) == {"a.parquet row 0"}


@pytest.fixture
def lists(tmp_path):
    path = tmp_path / "mathvista.jsonl"
    shown = item(0, picture("seen", 0b1111), question="<image>How many triangles?")
    assert write_hashes([shown, Item("b", 1, problem="no image")], path) == (1, 1)
    return path


def test_overlap(lists):
    overlap = Overlap([str(lists)], 2)
    assert overlap.find(item(0, picture("seen", 0))) == "a picture of mathvista"
    near = item(0, picture("re-encoded", 0b0011), question="<image> how many TRIANGLES")
    assert overlap.find(near) == "a question of mathvista, with nearly a picture of the lists"
    # Nearly the picture, other words; the words, another picture.
    assert overlap.find(dataclasses.replace(near, question="<image>How many circles?")) == ""
    assert overlap.find(item(0, picture("x", 0xFFFF), question="<image>How many triangles?")) == ""


def test_a_list_says_nothing_readable(lists):
    text = lists.read_text()
    assert "triangle" not in text.lower() and set(json.loads(text)) == {"text", "pixels", "dhash"}


def test_several_pictures(lists):
    assert Overlap([str(lists)], 0).find(item(0, picture("a"), picture("seen"))) == "a picture of mathvista"


@pytest.mark.parametrize("line", ["{}", "no json", '{"text": "a", "pixels": ["p"], "dhash": []}'])
def test_a_bad_list(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match="line 1 of .* must be a record of avar synth hashes"):
        Overlap([str(path)], 0)
    with pytest.raises(ValueError, match="an overlap list must be a file"):
        Overlap([str(tmp_path / "none.jsonl")], 0)
