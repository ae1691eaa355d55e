# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint, and batches of it."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from avar_verl.model.checkpoint import Checkpoint, generate_ids, load_config, load_model, load_processor
from avar_verl.model.families import FAMILIES
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


@pytest.fixture
def edited(tiny_model_path, tmp_path):
    """`edited(change)` -> a copy of the tiny model's folder after `change(weights)`."""

    def edit(change):
        folder = shutil.copytree(tiny_model_path, tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return edit


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def rename(weights, start: str) -> None:
    for name in list(weights):
        weights[start + name] = weights.pop(name)


def add_adapter(weights) -> None:
    rename(weights, "base_model.model.")
    name = f"base_model.model.{K_PROJ}"
    weights[name.replace(".weight", ".base_layer.weight")] = weights.pop(name)
    for part in "AB":
        weights[name.replace(".weight", f".lora_{part}.default.weight")] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop(K_PROJ),
            r": 1 missing: \S+layers.1.self_attn.k_proj.weight. Download the missing files again",
        ),
        (
            lambda w: [w.pop(n) for n in list(w) if ".layers.1." in n],
            r": \d\d missing: \S+, \S+, \S+layers\.1\.\S+. Do",
        ),
        (lambda w: w.update(value_head=torch.zeros(2)), ": 1 unexpected: value_head. Download"),
        (lambda w: w.update({K_PROJ: torch.zeros(2, 2)}), r": 1 of another shape: \S+k_proj.weight \(2, 2\) for \("),
        (
            lambda w: rename(w, "base_model.model."),
            r": \d+ missing: .*; \d+ unexpected: .* LoRA run.* is merged into its",
        ),
        (add_adapter, r": \d+ missing: .*; \d+ unexpected: base_model.*names of a LoRA run.*verl.model_merger"),
    ],
    ids=["one", "a layer", "unexpected", "shape", "names of peft", "adapter"],
)
def test_weights_that_are_not_the_checkpoint_s(edited, change, message):
    folder = edited(change)
    for load in (load_model, Checkpoint.load):
        with pytest.raises(ValueError, match=f"every weight must come from .*; got from {folder}{message}"):
            load(folder)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_loads(family_path, tmp_path, model_type):
    """Tied weights and names that transformers converts are right: as built, and as transformers saves it again."""
    model = load_model(family_path(model_type))
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_buffers_of_earlier_versions_are_right(edited):
    buffer = "model.rotary_emb.inv_freq"
    load_model(edited(lambda weights: weights.update({buffer: torch.zeros(2)})))


def test_an_adapter_alone_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="a model must be .* holds an adapter alone. An adapter is merged into its base"
    ):
        load_config(tmp_path)


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
