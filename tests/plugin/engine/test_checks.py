# SPDX-License-Identifier: Apache-2.0
"""Configs that the engine refuses before it loads a model, where they need a device or a family that is not here."""

import inspect
import re
from types import SimpleNamespace

import pytest
from verl.models.transformers.monkey_patch import patch_forward_with_backends

from avar_verl.model.families import FAMILIES
from avar_verl.plugin.config import AgtoConfig, VarsConfig
from avar_verl.plugin.engine import fsdp
from avar_verl.plugin.engine.config import AvarFSDPEngineConfig


def check(
    monkeypatch,
    model_type="qwen2_5_vl",
    use_remove_padding=True,
    processor="a processor",
    text=(),
    use_fused_kernels=False,
    attention="sdpa",
    **engine,
):
    monkeypatch.setattr(fsdp, "get_device_name", lambda: "cuda")
    text = SimpleNamespace(num_hidden_layers=4, num_attention_heads=4, hidden_size=128, **dict(text))
    config = SimpleNamespace(model_type=model_type, get_text_config=lambda: text, _attn_implementation=attention)
    model = SimpleNamespace(
        processor=processor,
        tokenizer_path="folder",
        use_remove_padding=use_remove_padding,
        use_fused_kernels=use_fused_kernels,
        hf_config=config,
    )
    fsdp.AvarFSDPEngine._check(model, AvarFSDPEngineConfig(**engine))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fused_kernels_that_would_leave_images_out_are_refused(monkeypatch, model_type):
    common = dict(model_type=model_type, strategy="fsdp2", use_remove_padding=False)
    check(monkeypatch, **common)
    if model_type in fsdp.FUSED:
        check(monkeypatch, **common, use_fused_kernels=True)
        return
    with pytest.raises(ValueError, match=f"got use_fused_kernels=True with model_type='{model_type}'. Set"):
        check(monkeypatch, **common, use_fused_kernels=True)


def test_verls_fused_forward_of_other_models_drops_images():
    """And that of those that are allowed takes them."""
    from verl.models.transformers import dense_common, glm4v, qwen2_vl, qwen3_5, qwen3_vl

    assert "pixel_values" not in inspect.signature(dense_common.forward_base_model).parameters
    assert "loss_kwargs" not in inspect.getsource(dense_common.forward_with_torch_backend).split("**loss_kwargs")[1]
    for module in (qwen2_vl, qwen3_vl, qwen3_5, glm4v):
        assert "**kwargs" in inspect.getsource(module.forward_with_torch_backend).split(") ->")[1]
    source = inspect.getsource(patch_forward_with_backends)
    named = re.findall(r'"(qwen\w*|glm\w*)"', source)
    assert sorted(named) == sorted(fsdp.FUSED)


@pytest.mark.parametrize("part", ["freeze_vision_tower", "freeze_projector"])
def test_fsdp1_freezes_only_what_it_does_not_flatten(monkeypatch, part):
    with pytest.raises(ValueError, match="FSDP1 flattens frozen and trained parameters together"):
        check(monkeypatch, strategy="fsdp", **{part: True})
    check(monkeypatch, strategy="fsdp", use_orig_params=True, **{part: True})
    check(monkeypatch, strategy="fsdp2", **{part: True})
    check(monkeypatch, strategy="fsdp")


@pytest.mark.parametrize("model_type", ["glm4v", "gemma3", "mllama", "mistral3", "glm4v_moe"])
def test_samples_that_cannot_be_packed_are_refused_where_masses_are_wanted(monkeypatch, model_type):
    agto = AgtoConfig(alpha=0.0)
    with pytest.raises(
        ValueError, match=rf"samples of {model_type} cannot be packed \(.*; got use_remove_padding=True"
    ):
        check(monkeypatch, model_type=model_type, strategy="fsdp2", agto=agto)
    check(monkeypatch, model_type=model_type, strategy="fsdp2", use_remove_padding=False, agto=agto)
    check(monkeypatch, model_type=model_type, strategy="fsdp2")


@pytest.mark.parametrize("model_type", ["lfm2_vl", "minicpmv4_6"])
def test_packed_samples_that_would_mix_are_refused_in_every_run(monkeypatch, model_type):
    """Short convolutions and gated DeltaNet go on from the sample before, and verl says nothing."""
    for agto in (None, AgtoConfig(alpha=0.0)):
        with pytest.raises(ValueError, match=rf"samples of {model_type} cannot be packed \(.*; got use_remove_padding"):
            check(monkeypatch, model_type=model_type, strategy="fsdp2", agto=agto)
        check(monkeypatch, model_type=model_type, strategy="fsdp2", agto=agto, use_remove_padding=False)


@pytest.mark.parametrize("model_type, text", [("gemma3", {}), ("gemma4", {"head_dim": 256, "global_head_dim": 512})])
def test_flash_attention_that_would_run_another_model_is_refused(monkeypatch, model_type, text):
    common = dict(model_type=model_type, strategy="fsdp2", use_remove_padding=False, text=text)
    for attention in ("flash_attention_2", "flash_attention_3"):
        with pytest.raises(ValueError, match=rf"flash attention cannot run this {model_type}: .*; got .*{attention}"):
            check(monkeypatch, **common, attention=attention)
    check(monkeypatch, **common, attention="sdpa")
    check(monkeypatch, strategy="fsdp2", attention="flash_attention_2")


def test_a_missing_processor_is_refused_where_masses_are_wanted(monkeypatch):
    with pytest.raises(ValueError, match="need the model's processor; verl loaded none from 'folder'"):
        check(monkeypatch, processor=None, strategy="fsdp2", agto=AgtoConfig())
    check(monkeypatch, processor=None, strategy="fsdp2")


def test_cross_attention_is_refused_where_masses_are_wanted(monkeypatch):
    with pytest.raises(ValueError, match="image and system keys in one softmax; got model_type='mllama'"):
        check(monkeypatch, model_type="mllama", strategy="fsdp2", use_remove_padding=False, agto=AgtoConfig())
    common = dict(model_type="mllama", strategy="fsdp2", use_remove_padding=False)
    check(monkeypatch, **common)
    check(monkeypatch, **common, agto=AgtoConfig(alpha=0.0, beta=0.15))


NORMALISING = SimpleNamespace(image_processor=SimpleNamespace(do_normalize=True))


def test_the_dependency_needs_no_masses(monkeypatch):
    """Cross-attention and sliding windows are no obstacle, unless masses are wanted too."""
    common = dict(strategy="fsdp2", use_remove_padding=False, processor=NORMALISING)
    check(monkeypatch, model_type="mllama", **common, vars=VarsConfig(statistic="dependency"))
    check(monkeypatch, model_type="mllama", **common, vars=VarsConfig(lambda_v=0, measure_dependency=True))
    for vars_config in (VarsConfig(statistic="dependency", measure=True), VarsConfig(measure_dependency=True)):
        with pytest.raises(ValueError, match="in one softmax; got .*'mllama'.*avar.vars.statistic to dependency"):
            check(monkeypatch, model_type="mllama", **common, vars=vars_config)
    text = dict(layer_types=["sliding_attention"] * 4, sliding_window=64)
    check(monkeypatch, model_type="gemma3", **common, text=text, vars=VarsConfig(statistic="dependency"))


def test_what_the_dependency_cannot_be_measured_with_is_refused(monkeypatch):
    vars_config = VarsConfig(statistic="dependency")
    with pytest.raises(ValueError, match="masses and visual dependency need the model's processor"):
        check(monkeypatch, processor=None, strategy="fsdp2", vars=vars_config)
    with pytest.raises(ValueError, match="samples of gemma3 cannot be packed"):
        check(monkeypatch, model_type="gemma3", processor=NORMALISING, strategy="fsdp2", vars=vars_config)
    raw = SimpleNamespace(image_processor=SimpleNamespace(do_normalize=False))
    with pytest.raises(ValueError, match="do_normalize=False"):
        check(monkeypatch, processor=raw, strategy="fsdp2", vars=vars_config)
    swapping = VarsConfig(statistic="dependency", corruption="swap")
    check(monkeypatch, processor=raw, strategy="fsdp2", vars=swapping)


def test_layers_with_a_window_are_refused_where_masses_are_wanted(monkeypatch):
    sliding, full = "sliding_attention", "full_attention"
    text = dict(layer_types=[sliding, full, sliding, full], sliding_window=64)
    common = dict(model_type="gemma3", strategy="fsdp2", use_remove_padding=False, text=text)
    agto = AgtoConfig(layers=[0, 1])
    with pytest.raises(ValueError, match=r"a sliding window of 64 tokens in layers \[0\]. Select some of \[1, 3\]"):
        check(monkeypatch, **common, agto=agto)
    check(monkeypatch, **common, agto=AgtoConfig(layers=[1, 3]))
    check(monkeypatch, **common, agto=AgtoConfig())  # Those without a window.
    check(monkeypatch, **common)


def test_weights_and_kernels_are_checked_for_the_layers_with_a_full_softmax(monkeypatch):
    linear, full = "linear_attention", "full_attention"
    text = dict(layer_types=[linear, full, linear, full], head_dim=64)
    common = dict(model_type="qwen3_vl", strategy="fsdp2", text=text)
    check(monkeypatch, **common, agto=AgtoConfig(layer_weights=[1.0, 2.0]))
    with pytest.raises(ValueError, match="one weight per layer; got 4 for 2 layers"):
        check(monkeypatch, **common, agto=AgtoConfig(layer_weights=[1.0] * 4))
    with pytest.raises(ValueError, match=r"linear attention .* in layers \[0\]"):
        check(monkeypatch, **common, agto=AgtoConfig(layers=[0]))
    check(monkeypatch, **common, agto=AgtoConfig(implementation="triton"))
    text["global_head_dim"] = 2048
    with pytest.raises(ValueError, match="the Triton kernel needs .* heads of 2048"):
        check(monkeypatch, **common, agto=AgtoConfig(implementation="triton"))
