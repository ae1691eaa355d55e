# SPDX-License-Identifier: Apache-2.0
"""The tiny model is a Qwen2.5-VL to everything that loads it."""

import pytest
import torch

from avar_verl.model.checkpoint import Checkpoint
from avar_verl.tools.demo import photo_grid
from avar_verl.tools.demo.measure import answer_attention, answers, headline, heatmap, measure_vas
from avar_verl.tools.demo.tiny_model import SPECIAL_TOKENS, TAG_TOKENS, build_tiny_model


def test_tags_survive_decoding_and_special_tokens_do_not(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    for token in (*SPECIAL_TOKENS, *TAG_TOKENS):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1, token
    for sample in photo_grid.make_samples(7, 0, "test"):
        ids = tokenizer.encode(sample.response + "<|im_end|>", add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == sample.response
        assert len(ids) <= 64


@pytest.mark.parametrize("text", ["caf\u00e9 \u2603 12345, x_1!\n\n  two", "<b>tag</b>", "\u56fe\u4e2d"])
def test_any_text_round_trips(tiny_processor, text):
    tokenizer = tiny_processor.tokenizer
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_verl_loads_its_processor(tiny_model_path):
    from verl.utils.tokenizer import hf_processor, hf_tokenizer

    assert hf_processor(str(tiny_model_path)) is not None
    assert hf_tokenizer(str(tiny_model_path)).pad_token == "<|endoftext|>"


def test_the_seed_decides_the_weights(tmp_path, tiny_model_path):
    def weights(path):
        return Checkpoint.load(path).model.state_dict()

    same, other = weights(build_tiny_model(tmp_path / "a", seed=0)), weights(build_tiny_model(tmp_path / "b", seed=1))
    for name, tensor in weights(tiny_model_path).items():
        assert torch.equal(tensor, same[name])
    assert any(not torch.equal(tensor, other[name]) for name, tensor in same.items())
    assert sum(tensor.numel() for tensor in same.values()) < 1_100_000


def test_measuring_does_not_depend_on_the_batch_size(tiny_model_path):
    checkpoint = Checkpoint.load(tiny_model_path)
    samples = photo_grid.make_samples(5, 0, "test")
    one, five = measure_vas(checkpoint, samples, batch_size=1), measure_vas(checkpoint, samples, batch_size=5)
    for query in ("user", "response"):
        assert headline(one[query])["num_samples"] == 5 and one[query]["num_queries"] == five[query]["num_queries"]
        assert headline(one[query]) == pytest.approx(headline(five[query]), rel=1e-4)
        assert torch.tensor(heatmap(one[query])["share"]).mean() == pytest.approx(headline(one[query])["image_share"])
    assert answers(checkpoint, samples, 8, batch_size=1) == answers(checkpoint, samples, 8, batch_size=5)


def test_where_an_answer_looks(tiny_model_path):
    checkpoint = Checkpoint.load(tiny_model_path)
    sample = photo_grid.make_samples(1, 0, "test")[0]
    attention = answer_attention(checkpoint, sample, sample.response)
    assert attention.shape == (16,) and 0 < float(attention.sum()) < 1
    other = sample.response.replace("<answer>", "<answer>cat</answer><answer>", 1)  # The last answer counts.
    assert float(answer_attention(checkpoint, sample, other).sum()) != float(attention.sum())
    with pytest.raises(ValueError, match="got 16 and 0"):
        answer_attention(checkpoint, sample, "no answer")
