# SPDX-License-Identifier: Apache-2.0
"""Patches that bring verl's other families back: processors, GLM-4.1V's features, features of rollouts."""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from avar_verl.attention.capture import find_decoder
from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import render
from avar_verl.plugin.compat.verl import glm4v, processor, qwen3_5, rollout_features
from avar_verl.plugin.switch import switch_on
from tests.model.families import tiny


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_verl_loads_the_processor_of_every_family(family_path, model_type):
    switch_on()
    from verl.utils import hf_processor

    loaded = hf_processor(family_path(model_type))
    assert type(loaded) is type(AutoProcessor.from_pretrained(family_path(model_type)))
    assert loaded.config.model_type == model_type


def stock() -> SimpleNamespace:
    return SimpleNamespace(hf_processor=lambda path, **kwargs: None)  # What verl's function returns after any error.


def test_a_known_family_without_its_processor_is_refused(family_path, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in family_path("gemma3").iterdir():
        if "processor" not in file.name:
            (folder / file.name).symlink_to(file)
    module = stock()
    processor.apply(module)
    with pytest.raises(ValueError, match="a checkpoint must have a processor for images"):
        module.hf_processor(folder)


def test_an_unknown_family_stays_verls_business(tmp_path):
    from transformers import Qwen2Config

    Qwen2Config(hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    module = stock()
    processor.apply(module)
    assert module.hf_processor(tmp_path) is None


def test_glm4v_embeds_images_as_transformers_does(family_path):
    model = AutoModelForImageTextToText.from_pretrained(family_path("glm4v"), dtype=torch.float32).eval()
    loaded = AutoProcessor.from_pretrained(family_path("glm4v"))
    inputs = render(loaded, tiny.sample_messages(1))
    ids, features = inputs.ids_S[None], inputs.features
    seen = {}

    def keep(_module, _args, kwargs):
        seen["embeds"] = kwargs["inputs_embeds"]

    handle = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids, **features, mm_token_type_ids=(ids == model.config.image_token_id).long())
        embeds, _ = glm4v.get_input_embeds(model.model, ids, None, **features)
        handle.remove()
        assert torch.equal(embeds, seen["embeds"])
        text = ids[ids != model.config.image_token_id][None]
        plain, _ = glm4v.get_input_embeds(model.model, text)
        assert torch.equal(plain, model.get_input_embeddings()(text))
    with pytest.raises(ValueError, match="every image feature needs one placeholder; got 0"):
        glm4v.get_input_embeds(model.model, text, None, **features)
    with pytest.raises(ValueError, match="got a video"):
        glm4v.get_input_embeds(model.model, text, pixel_values_videos=features["pixel_values"])


def test_a_text_only_batch_runs_the_tower_of_glm4v(family_path):
    model = AutoModelForImageTextToText.from_pretrained(family_path("glm4v"), dtype=torch.float32)
    embeds, _ = glm4v.get_input_embeds(model.model, torch.tensor([[1, 2, 3]]))
    embeds.sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if "visual" in name and p.grad is not None]
    assert grads and all(not bool(grad.any()) for grad in grads)


def fresh_qwen3_5():
    """verl's module as it is, whatever has been patched."""
    source = Path(importlib.util.find_spec("verl.models.transformers.qwen3_5").origin)
    module = ModuleType("verl.models.transformers.qwen3_5")
    module.__file__ = str(source)
    exec(compile(source.read_text(), str(source), "exec"), vars(module))
    return module


def test_packed_samples_of_qwen3_5_do_not_leak_into_each_other(family_model):
    """The outputs of gated DeltaNet for two packed samples are those of each by itself. As verl has it they are not: if
    this fails, verl separates the samples itself, and the patch can go.
    """
    layer = find_decoder(family_model("qwen3_5")).layers[0].linear_attn
    assert layer.chunk_gated_delta_rule.__module__.startswith("transformers."), "flash-linear-attention is installed"
    hidden_1SD = torch.randn(1, 80, 128, generator=torch.Generator().manual_seed(0))
    module = fresh_qwen3_5()

    def run(part_1SD, *bounds):
        cu_seqlens = torch.tensor(bounds) if bounds else None
        with torch.no_grad():
            return module.qwen3_5_gated_delta_net_forward(layer, part_1SD, cu_seqlens=cu_seqlens)

    alone_1SD = torch.cat([run(hidden_1SD[:, :70]), run(hidden_1SD[:, 70:])], dim=1)
    leak_1SD = (run(hidden_1SD, 0, 70, 80) - alone_1SD).abs()
    assert leak_1SD[:, 70:].max() > 1e-2 * alone_1SD.abs().max() > 0
    qwen3_5.apply(module)
    torch.testing.assert_close(run(hidden_1SD, 0, 70, 80), alone_1SD, atol=1e-5, rtol=0)


def test_a_kernel_that_names_the_bounds_gets_them():
    """Such as that of flash-linear-attention: one call for all samples."""

    def kernel(query, key, value, g, beta, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs):
        return cu_seqlens, None

    module = fresh_qwen3_5()
    qwen3_5.apply(module)
    layer = SimpleNamespace(chunk_gated_delta_rule=kernel)
    bounds = torch.tensor([0, 2, 5])
    assert module._packed_chunk_gated_delta_rule(layer, *[None] * 5, bounds, bounds)[0] is bounds


def test_features_of_a_rollout_are_used_and_others_computed():
    class Worker:
        processor = SimpleNamespace(get_rope_index=None)

        def _compute_multi_modal_inputs(self, output, input_ids):
            return {"from": "verl"}

    module = SimpleNamespace(AgentLoopWorker=Worker)
    rollout_features.apply(module)
    features = {"pixel_values": torch.ones(8, 2), "image_grid_thw": torch.tensor([[2, 2, 2]])}
    output = SimpleNamespace(multi_modal_data={rollout_features.FEATURES: copy.copy(features)})
    for _ in range(2):  # verl asks for the reward, and again to store the rollout.
        got = Worker()._compute_multi_modal_inputs(output, None)
        assert torch.equal(got["pixel_values"], features["pixel_values"])
        assert got["images_seqlens"].tolist() == [4, 4] and "mm_token_type_ids" in got
    for other in ({"images": [1]}, None):
        output = SimpleNamespace(multi_modal_data=other)
        assert Worker()._compute_multi_modal_inputs(output, None) == {"from": "verl"}


def test_every_family_names_its_model_type():
    for model_type in FAMILIES:
        assert model_type in get_family(model_type).model_types
