# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint, and batches of it."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoConfig

from avar_verl.model.checkpoint import Checkpoint, generate_ids, load_config, load_processor
from avar_verl.model.render import render
from tests.model.families.tiny import sample_messages


def prompts(checkpoint, *counts):
    messages = [sample_messages(count, answered=False) for count in counts]
    return [render(checkpoint.processor, one, add_generation_prompt=True) for one in messages]


def test_a_tokenizer_without_padding_changes_no_answer(tiny_model_path):
    checkpoint = Checkpoint.load(tiny_model_path)
    processor = copy.deepcopy(checkpoint.processor)
    processor.tokenizer.pad_token = None
    assert processor.tokenizer.pad_token_id is None
    without = dataclasses.replace(checkpoint, processor=processor)
    two = prompts(checkpoint, 1, 2)
    inputs = without.collate(two)
    assert inputs["input_ids"][0, -1] == 0 and not inputs["attention_mask"][0, -1]
    assert generate_ids(without, two, 6) == generate_ids(checkpoint, two, 6)


def test_responses_end_where_they_stopped(tiny_model_path):
    checkpoint = Checkpoint.load(tiny_model_path)
    stop = checkpoint.model.generation_config.eos_token_id
    ids_BS = torch.tensor([[9, 5, stop, 7], [9, 5, 6, 7]])
    assert checkpoint.responses(ids_BS, 1) == [([5, stop], "stop"), ([5, 6, 7], "length")]


def test_a_model_is_loaded_as_its_family_needs_it(family_path):
    """Llama 3.2 Vision: a row without an image reads nothing from the images of the others."""
    checkpoint = Checkpoint.load(family_path("mllama"))
    text, image = prompts(checkpoint, 0, 1)
    with torch.no_grad():
        alone, beside = (checkpoint.model(**checkpoint.collate(batch)).logits[0] for batch in ([text], [text, image]))
    assert torch.allclose(alone, beside[: len(alone)], atol=1e-5)
    with pytest.raises(ValueError, match="generates one response at a time .* got a batch of 2"):
        checkpoint.prompts([text, image])
    assert checkpoint.prompts([image])["input_ids"].shape[0] == 1


def test_what_is_no_checkpoint(tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match="a model must be a Hugging Face folder or a name on the hub; got '/nowhere'"):
        load_config("/nowhere")
    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    rule = "a checkpoint must have a processor for images; got from .*: "
    with pytest.raises(ValueError, match=f"{rule}Can't load image processor"):
        load_processor(folder)
    AutoConfig.for_model("qwen2").save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["processor_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{rule}.*Tokenizer"):
        load_processor(folder)
