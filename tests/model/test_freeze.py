# SPDX-License-Identifier: Apache-2.0
"""Which parameters `freeze_vision` takes out of training, on the tiny Qwen2.5-VL."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from avar_verl.model.freeze import excluded_modules, freeze_adapters, freeze_vision


@pytest.fixture
def model(tiny_model_path):
    return AutoModelForImageTextToText.from_pretrained(tiny_model_path)


@pytest.mark.parametrize(
    "tower, projector, frozen_prefixes",
    [
        (False, False, ()),
        (True, False, ("model.visual.patch_embed", "model.visual.blocks")),
        (False, True, ("model.visual.merger",)),
        (True, True, ("model.visual",)),
    ],
)
def test_the_chosen_parts_and_no_others(model, tower, projector, frozen_prefixes):
    frozen = freeze_vision(model, "qwen2_5_vl", tower, projector)
    without_gradient = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert sorted(frozen) == sorted(without_gradient)
    expected = [name for name, _ in model.named_parameters() if name.startswith(frozen_prefixes)]
    assert sorted(without_gradient) == sorted(expected)
    assert bool(expected) is (tower or projector)


def test_an_unknown_family_is_refused(model):
    with pytest.raises(ValueError, match="known model family; got model_type='blip'"):
        freeze_vision(model, "blip", True, False)


def test_a_model_without_the_part_is_refused():
    with pytest.raises(ValueError, match="needs parameters under 'model.visual'; got none in Linear"):
        freeze_vision(torch.nn.Linear(2, 2), "qwen2_5_vl", True, False)


@pytest.mark.parametrize("exclude", [None, ["gate_proj"], ".*gate_proj"])
@pytest.mark.parametrize(
    ("tower", "projector", "without"),
    [(True, False, ("model.visual.blocks", "model.visual.patch_embed")), (True, True, ("model.visual",))],
)
def test_no_adapter_in_a_frozen_part(model, tower, projector, without, exclude):
    frozen = freeze_vision(model, "qwen2_5_vl", tower, projector)
    config = LoraConfig(target_modules="all-linear", exclude_modules=excluded_modules(frozen, exclude))
    names = [name for name, p in get_peft_model(model, config).named_parameters() if p.requires_grad]
    names = [name.removeprefix("base_model.model.") for name in names]
    assert not [name for name in names if name.startswith(without)]
    assert any("merger" in name for name in names) is not projector
    assert any("q_proj" in name for name in names)
    assert any("language_model" in name and "gate_proj" in name for name in names) is (exclude is None)


def test_adapters_that_were_there_are_frozen_too(model):
    frozen = freeze_vision(model, "qwen2_5_vl", True, False)
    with_adapters = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert any("visual.blocks" in name for name, p in with_adapters.named_parameters() if p.requires_grad)
    freeze_adapters(with_adapters, frozen)
    names = [name for name, p in with_adapters.named_parameters() if p.requires_grad]
    assert not any("visual.blocks" in name for name in names) and any("visual.merger" in name for name in names)
