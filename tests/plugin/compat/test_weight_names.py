# SPDX-License-Identifier: Apache-2.0
"""Names under which weights and adapters of every family reach the rollout engine: those of its checkpoint."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText
from verl.utils.fsdp_utils import replace_lora_wrapper

from avar_verl.model.families import FAMILIES, get_family
from avar_verl.plugin.compat.verl.weight_names import checkpoint_name, peft_name

TARGETS = ["q_proj", "k_proj", "v_proj"]


def names_of(path) -> set[str]:
    names = set()
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names |= set(weights.keys())
    return names


@pytest.mark.parametrize("model_type", FAMILIES)
def test_adapters_and_the_weights_under_them_have_the_names_of_the_checkpoint(model_type, family_path):
    family, expected = get_family(model_type), names_of(family_path(model_type))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(family_path(model_type)))
        exclude = rf"({'|'.join((*family.towers, *family.projectors))})\..*"
        model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, exclude_modules=exclude))
    name_of = peft_name(checkpoint_name(model.get_base_model()))
    adapters = [name_of(name) for name in get_peft_model_state_dict(model)]
    assert len(adapters) > 2
    for name in adapters:
        module, _, leaf = name.removeprefix("base_model.model.").partition(".lora_")
        assert name.startswith("base_model.model.") and leaf in ("A.weight", "B.weight")
        assert f"{module}.weight" in expected, name

    config = model.peft_config["default"]
    sent = set()
    for name, _ in model.get_base_model().named_parameters():
        if "lora_" not in name:
            name = name_of(replace_lora_wrapper(name.replace(".base_layer", ""), config))
            sent.add(name.replace(".base_layer", ""))
            assert (".base_layer." in name) == any(f".{target}." in name for target in TARGETS) or "_proj" in name
    missing = {name for name in sent - expected if "experts" not in name}
    assert not {name for name in missing if name != "lm_head.weight"}, sorted(missing)[:4]


def test_names_by_hand():
    name = peft_name(lambda own: own.replace("model.language_model", "language_model.model"))
    head = "base_model.model."
    assert (
        name(f"{head}model.language_model.a.q_proj.lora_A.weight")
        == f"{head}language_model.model.a.q_proj.lora_A.weight"
    )
    assert name("model.language_model.a.q_proj.base_layer.bias") == "language_model.model.a.q_proj.base_layer.bias"
    assert name("model.language_model.norm.weight") == "language_model.model.norm.weight"
