# SPDX-License-Identifier: Apache-2.0
"""Configs that the engine refuses before it loads a model, where they need a device or a family that is not here."""

from types import SimpleNamespace

import pytest

from avar_verl.config import AgtoConfig
from avar_verl.engine import fsdp
from avar_verl.engine_config import AvarFSDPEngineConfig


def check(monkeypatch, model_type="qwen2_5_vl", use_remove_padding=True, processor="a processor", **engine):
    monkeypatch.setattr(fsdp, "get_device_name", lambda: "cuda")
    text = SimpleNamespace(num_hidden_layers=4, num_attention_heads=4, hidden_size=128)
    config = SimpleNamespace(model_type=model_type, get_text_config=lambda: text)
    model = SimpleNamespace(
        processor=processor, tokenizer_path="folder", use_remove_padding=use_remove_padding, hf_config=config
    )
    fsdp.AvarFSDPEngine._check(model, AvarFSDPEngineConfig(**engine))


@pytest.mark.parametrize("part", ["freeze_vision_tower", "freeze_projector"])
def test_fsdp1_freezes_only_what_it_does_not_flatten(monkeypatch, part):
    with pytest.raises(ValueError, match="FSDP1 flattens frozen and trained parameters together"):
        check(monkeypatch, strategy="fsdp", **{part: True})
    check(monkeypatch, strategy="fsdp", use_orig_params=True, **{part: True})
    check(monkeypatch, strategy="fsdp2", **{part: True})
    check(monkeypatch, strategy="fsdp")


def test_packed_attention_that_is_not_wrapped_is_refused_where_masses_are_wanted(monkeypatch):
    with pytest.raises(ValueError, match="an attention of verl's that this plugin wraps; got model_type='glm4v'"):
        check(monkeypatch, model_type="glm4v", strategy="fsdp2", agto=AgtoConfig())
    check(monkeypatch, model_type="glm4v", strategy="fsdp2", use_remove_padding=False, agto=AgtoConfig())
    check(monkeypatch, model_type="glm4v", strategy="fsdp2")


def test_a_missing_processor_is_refused_where_masses_are_wanted(monkeypatch):
    with pytest.raises(ValueError, match="need the model's processor; verl loaded none from 'folder'"):
        check(monkeypatch, processor=None, strategy="fsdp2", agto=AgtoConfig())
    check(monkeypatch, processor=None, strategy="fsdp2")


def test_cross_attention_is_refused_where_masses_are_wanted(monkeypatch):
    with pytest.raises(ValueError, match="image and system keys in one softmax; got model_type='mllama'"):
        check(monkeypatch, model_type="mllama", strategy="fsdp2", use_remove_padding=False, agto=AgtoConfig())
    check(monkeypatch, model_type="mllama", strategy="fsdp2", use_remove_padding=False)
