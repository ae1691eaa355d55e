# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: who sees whom in an image, keys of another layer, heads of several sizes."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from avar_verl.attention.capture import capture_mass
from avar_verl.model.families import get_family
from avar_verl.model.families.gemma4 import no_flash
from avar_verl.model.render import collate, merge_features, render
from avar_verl.roles import RoleMap, TokenRole
from tests.model.families.tiny import sample_messages

BOTH = pytest.mark.parametrize("name", ["gemma4", "gemma4_large"])
FAMILY = get_family("gemma4")


@pytest.fixture(scope="module")
def load(family_path):
    """`load(name, attention, prepare)` -> a model of its own."""

    def run(name: str, attention: str = "eager", prepare: bool = True):
        path = family_path(name)
        model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation=attention).eval()
        if prepare:
            FAMILY.prepare(model)
        return model

    return run


@pytest.fixture
def batch(family_processor):
    """`batch(name, model)` -> two samples with two images and none, and their roles."""

    def run(name: str, model, padding_side: str = "right"):
        processor = family_processor(name)
        conversations = sample_messages(2, system=True, turns=2), sample_messages(0, seed=2, system=True)
        samples = [render(processor, messages) for messages in conversations]
        inputs = collate(FAMILY, model.config, samples, processor.tokenizer.pad_token_id, padding_side)
        roles_BS = RoleMap.from_pretrained(processor, model.config)(inputs["input_ids"], inputs["attention_mask"])
        return inputs, roles_BS

    return run


def sees_later_tokens(model, inputs) -> list[bool]:
    """By layer: whether a query of a sample has attention for a key after it."""
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    real_BS = inputs["attention_mask"].bool()
    return [bool(layer_BHSS.triu(1).transpose(1, 2)[real_BS].any()) for layer_BHSS in attentions]


def test_tokens_of_an_image_see_each_other_in_layers_with_a_window_only(load, batch):
    model = load("gemma4_large")
    inputs, roles_BS = batch("gemma4_large", model)
    assert model.config.text_config.layer_types == ["sliding_attention", "full_attention"]
    assert sees_later_tokens(model, inputs) == [True, False]
    with torch.no_grad():
        sliding_BHSS = model(**inputs, output_attentions=True).attentions[0]
    first, last = (roles_BS[0] == TokenRole.IMAGE).nonzero()[[0, -1], 0].tolist()
    edge = first + int((roles_BS[0, first:] != TokenRole.IMAGE).nonzero()[0])  # After the first of two images.
    assert bool((sliding_BHSS[0, :, first:edge, first:edge] > 0).all())
    assert not sliding_BHSS[0, :, first:edge, edge:].any() and edge < last


def test_transformers_lets_them_in_all_layers(load, batch):
    """If this fails, transformers has fixed it and `prepare` can go."""
    model = load("gemma4_large", prepare=False)
    assert sees_later_tokens(model, batch("gemma4_large", model)[0]) == [True, True]


def test_small_models_are_causal(load, batch):
    model = load("gemma4")
    assert sees_later_tokens(model, batch("gemma4", model)[0]) == [False] * 3
    assert not model.get_submodule("model.language_model")._forward_pre_hooks


@pytest.mark.parametrize("padding_side", ["right", "left"])
@BOTH
def test_masses_are_those_of_eager_attention_in_every_layer(name, padding_side, load, batch):
    """With heads of 32 and 64, shared keys, and fewer heads of keys."""
    model = load(name)
    inputs, roles_BS = batch(name, model, padding_side)
    every = range(model.config.text_config.num_hidden_layers)
    with torch.no_grad(), capture_mass(model, roles_BS, layers=every) as captured:
        attentions = model(**inputs, output_attentions=True).attentions
    real_BS = inputs["attention_mask"].bool()
    is_role_BSR = torch.nn.functional.one_hot(roles_BS, len(TokenRole)).float()
    for layer, weights_BHSS in enumerate(attentions):
        expected_BHSR = weights_BHSS @ is_role_BSR[:, None]
        difference_BHSR = captured.mass[:, layer] - expected_BHSR
        assert difference_BHSR.transpose(1, 2)[real_BS].abs().max() < 1e-5


@BOTH
def test_the_default_are_layers_without_a_window(name, load, batch):
    model = load(name, "sdpa")
    inputs, roles_BS = batch(name, model)
    with torch.no_grad(), capture_mass(model, roles_BS) as captured:
        model(**inputs)
    assert captured.layers == ((1, 2) if name == "gemma4" else (1,))


def test_the_mass_of_a_layer_with_the_keys_of_another_one_moves_that_one(load, batch):
    model = load("gemma4", "sdpa")
    inputs, roles_BS = batch("gemma4", model)
    with capture_mass(model, roles_BS, layers=[2], query_role=TokenRole.RESPONSE) as captured:
        model(**inputs)
    captured.mass[..., TokenRole.IMAGE].sum().backward()
    layers = model.model.language_model.layers
    assert not hasattr(layers[2].self_attn, "k_proj")
    assert layers[1].self_attn.k_proj.weight.grad.abs().max() > 0
    assert layers[0].self_attn.k_proj.weight.grad.abs().max() > 0  # Through the residual stream.


@BOTH
def test_a_cache_changes_nothing(name, load, batch):
    model = load(name, "sdpa")
    inputs, _ = batch(name, model, padding_side="left")
    out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    ids_BS = out.sequences
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    inputs |= {"input_ids": ids_BS, **FAMILY.token_inputs(model.config, ids_BS, {})}
    with torch.no_grad():
        logits_BSV = model(**inputs).logits
    for step, logits_BV in enumerate(out.logits):
        torch.testing.assert_close(logits_BV, logits_BSV[:, step - 5], atol=1e-4, rtol=0)


def test_flash_attention_cannot_run_these_models(family_model):
    small, large = (family_model(name).config.text_config for name in ("gemma4", "gemma4_large"))
    assert no_flash(small) is None  # Of heads of 64.
    assert "tokens of one image see each other" in no_flash(large)
    small.global_head_dim = 512
    try:
        assert "have 512" in no_flash(small)
    finally:
        small.global_head_dim = 64


def test_a_mask_that_is_no_mask_of_pairs_is_refused(load):
    """Flash attention has none."""
    model = load("gemma4_large", "sdpa")
    masks = {"full_attention": None, "sliding_attention": None}
    with pytest.raises(ValueError, match="needs a mask of every pair of positions, .*; got NoneType with"):
        model.model.language_model(inputs_embeds=torch.zeros(1, 4, 128), attention_mask=masks)


def test_padding_of_positions_is_no_position():
    """Where images have different numbers of patches."""
    short, long = ({"image_position_ids": torch.zeros(1, count, 2, dtype=torch.long)} for count in (2, 3))
    merged = merge_features(FAMILY, [short, long])["image_position_ids"]
    assert merged.tolist() == [[[0, 0], [0, 0], [-1, -1]], [[0, 0], [0, 0], [0, 0]]]


def test_places_are_where_the_pixels_are(family_model, family_processor):
    """A picture that is white at the top right, pooled as the model pools patches."""
    processor, tower = family_processor("gemma4"), family_model("gemma4").model.vision_tower
    image = Image.new("RGB", (224, 112))
    image.paste((255, 255, 255), (112, 0, 224, 56))
    rendered = render(processor, [{"role": "user", "content": [{"type": "image", "image": image}]}])
    patches_1P, positions_1P2 = rendered.features["pixel_values"].mean(-1), rendered.features["image_position_ids"]
    pooled, is_token = tower.pooler(
        patches_1P[..., None].clone(), positions_1P2, (positions_1P2 == -1).all(-1), patches_1P.shape[1] // 4
    )
    bright_N = pooled[is_token][:, 0] / tower.pooler.root_hidden_size
    [places_N4] = FAMILY.image_places(processor, rendered.features)
    assert len(places_N4) == len(bright_N) == int((rendered.ids_S == processor.image_token_id).sum())
    x_N, y_N = places_N4[:, 0::2].mean(1), places_N4[:, 1::2].mean(1)
    inside_N = (x_N > 0.5) & (y_N < 0.5)
    clear_N = ((x_N - 0.5).abs() > 0.13) & ((y_N - 0.5).abs() > 0.13)  # No token on the edge.
    assert int((clear_N & inside_N).sum()) >= 4
    assert bool((bright_N[clear_N & inside_N] > 0.9).all()) and bool((bright_N[clear_N & ~inside_N] < 0.1).all())
