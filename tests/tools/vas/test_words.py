# SPDX-License-Identifier: Apache-2.0
"""Words are found in tokens, and where they look adds up to the masses of the record."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from avar_verl.roles import TokenRole
from avar_verl.tools.vas.score import Scorer
from avar_verl.tools.vas.words import choose_words, raster, shrunk, where_words_look, words_of
from tests.tools.vas.conftest import conversation


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "llava_next", "gemma3"])
def test_a_word_is_its_tokens(model_type, family_processor):
    """Whatever a tokenizer does with spaces, and in however many tokens it writes a word."""
    tokenizer = family_processor(model_type).tokenizer
    text = "<think>top left shows the zzgalaxiesq. 56</think>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = words_of(tokenizer, ids)
    assert [word for word, _ in found] == ["top", "left", "shows", "the", "zzgalaxiesq", "56"]
    for word, tokens in found:
        assert word in tokenizer.decode([ids[at] for at in tokens]), word
    assert len(dict(found)["zzgalaxiesq"]) > 1
    taken = [at for _, tokens in found for at in tokens]
    assert taken == sorted(set(taken))


def test_the_words_that_look_most_are_chosen_in_the_order_of_the_text():
    words = [("The", [0]), ("cat", [1, 2]), ("is", [3]), ("red", [4]), ("cat", [5]), ("dog", [6]), ("hat", [7])]
    mass = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.2, 0.9, 0.6, 0.3])
    assert choose_words(words, mass, None) == [("cat", [1, 2]), ("red", [4]), ("dog", [6]), ("hat", [7])]
    assert choose_words(words, mass, ["DOG", "is", "bird"]) == [("is", [3]), ("dog", [6])]
    assert choose_words([], mass, None) == []


def test_a_raster_keeps_the_mass():
    places = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    out = raster(places, torch.tensor([4.0, 2.0, 16.0]), (4, 4))
    assert out.sum() == pytest.approx(22.0)
    assert out[0, 0] == 2.0 and out[0, 3] == 1.0 and out[3, 3] == 1.5
    tiny = raster(torch.tensor([[0.99, 0.99, 1.0, 1.0]]), torch.tensor([3.0]), (4, 4))
    assert tiny[3, 3] == 3.0 and tiny.sum() == 3.0


def test_pictures_are_shrunk():
    assert shrunk(Image.new("RGB", (640, 100))).size == (320, 50)
    assert shrunk(Image.new("RGB", (64, 10))).size == (64, 10)


@pytest.mark.parametrize("model_type, layers", [("qwen2_5_vl", None), ("gemma3", (1,)), ("internvl", None)])
def test_where_words_look_adds_up(model_type, layers, family_checkpoint):
    """The mass of a word of one token is that of the query before it, here from a record of only this query."""
    checkpoint = family_checkpoint(model_type)
    scorer, one = Scorer(checkpoint, layers=layers), conversation(2, seed=1)
    [sample] = scorer.prepare([one])
    shown = where_words_look(checkpoint, one, sample, scorer.layers, ["shows"])
    [word] = shown["words"]
    assert word["word"] == "shows" and shown["note"] == "" and len(shown["images"]) == 2
    assert shown["question"] and "shows" in shown["response"]
    assert [len(places) for places in shown["places"]] == list(sample.tokens_I)
    assert len(word["tokens_mass"]) == sample.tokens_I[word["image"]]

    tokenizer = checkpoint.processor.tokenizer
    is_response_S = sample.roles_S == TokenRole.RESPONSE
    at = next(
        int(position)
        for position in is_response_S.nonzero()
        if tokenizer.decode([int(sample.rendered.ids_S[position])]).strip() == "shows"
    )
    alone_S = sample.roles_S.masked_fill(is_response_S, TokenRole.OTHER)
    alone_S[at - 1] = TokenRole.RESPONSE
    [record] = scorer.score([type(sample)(sample.rendered, alone_S, sample.tokens_I, None)])
    by_image = record["response"]["image_mass"]
    assert word["mass"] == pytest.approx(sum(by_image), rel=1e-5)
    assert sum(word["tokens_mass"]) == pytest.approx(max(by_image), rel=1e-5)
    assert by_image[word["image"]] == max(by_image)


def test_a_family_without_places_says_so(family_checkpoint):
    checkpoint = family_checkpoint("llava_next")
    scorer, one = Scorer(checkpoint), conversation(1)
    shown = where_words_look(checkpoint, one, scorer.prepare([one])[0], scorer.layers)
    assert shown["words"] == [] and "not represent known rectangles" in shown["note"]
    with Image.open(io.BytesIO(base64.b64decode(shown["images"][0]))) as image:
        assert np.asarray(image).any()


def test_words_that_a_response_lacks_are_said(family_checkpoint):
    checkpoint = family_checkpoint("qwen2_5_vl")
    scorer, one = Scorer(checkpoint), conversation(1)
    shown = where_words_look(checkpoint, one, scorer.prepare([one])[0], scorer.layers, ["unicorn"])
    assert shown["words"] == [] and shown["note"] == "The response has none of the words to show."
