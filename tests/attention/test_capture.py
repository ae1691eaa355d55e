# SPDX-License-Identifier: Apache-2.0
"""Masses of a real model against its own attention weights, on real images."""

import gc
import weakref

import pytest
import torch

from avar_verl.attention import capture_mass
from avar_verl.attention.capture import find_decoder
from avar_verl.roles import TokenRole

CLOSE = dict(rtol=1e-5, atol=1e-5)


def eager_masses(model, inputs, roles):
    """(B, L, H, S, R) from output_attentions, with padding queries at 0."""
    attentions = model(**inputs, use_cache=False, output_attentions=True).attentions
    onehot = torch.nn.functional.one_hot(roles, len(TokenRole)).float()
    mass = torch.stack([weights @ onehot[:, None] for weights in attentions], dim=1)
    return mass * inputs["attention_mask"][:, None, None, :, None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_models_own_attention(load_tiny, encode, role_map, attention, side):
    inputs = encode(3, side)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    model = load_tiny(attention)
    with torch.no_grad():
        expected = eager_masses(load_tiny("eager"), inputs, roles)
        with capture_mass(model, roles) as captured:
            model(**inputs, use_cache=False)
    assert captured.mass.shape == (3, 4, 4, roles.shape[1], 5)
    torch.testing.assert_close(captured.mass, expected, **CLOSE)


def test_subsets_of_layers_and_queries(load_tiny, encode, role_map):
    inputs = encode(3)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    model = load_tiny("sdpa")
    with torch.no_grad():
        with capture_mass(model, roles) as everything:
            model(**inputs, use_cache=False)
        with capture_mass(model, roles, layers=[-1, 1], query_role=TokenRole.RESPONSE) as part:
            model(**inputs, use_cache=False)
    assert part.layers == (1, 3)
    rows = (roles == TokenRole.RESPONSE)[:, None, None, :, None]
    torch.testing.assert_close(part.mass, everything.mass[:, [1, 3]] * rows, **CLOSE)
    assert bool((part.mass.sum(-1) > 0).any())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_row_equals_padded_rows(load_tiny, encode, role_map, attention):
    """Two samples in one row, told apart by their position ids alone."""
    inputs = encode(2)
    model = load_tiny(attention)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    lengths = inputs["attention_mask"].sum(1).tolist()
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    text = torch.arange(roles.shape[1]).expand(1, 2, -1)
    rows_4BS = torch.cat([text, positions])
    packed = {
        "input_ids": torch.cat([inputs["input_ids"][i, :n] for i, n in enumerate(lengths)])[None],
        "position_ids": torch.cat([rows_4BS[:, i, :n] for i, n in enumerate(lengths)], dim=1)[:, None],
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"],
    }
    with torch.no_grad():
        with capture_mass(model, roles) as padded:
            model(**inputs, use_cache=False)
        with capture_mass(model, role_map(packed["input_ids"])) as row:
            model(**packed, use_cache=False)
    expected = torch.cat([padded.mass[i, :, :, :n] for i, n in enumerate(lengths)], dim=2)
    torch.testing.assert_close(row.mass[0], expected, **CLOSE)


def guided_gradients(model, inputs, roles, from_eager=False):
    model.zero_grad()
    if from_eager:
        mass = eager_masses(model, inputs, roles)
    else:
        with capture_mass(model, roles, query_role=TokenRole.RESPONSE) as captured:
            model(**inputs, use_cache=False)
        mass = captured.mass
    rows = roles == TokenRole.RESPONSE
    image = mass[..., TokenRole.IMAGE].movedim(3, 1)[rows].mean(0)  # (L, H)
    loss = -image.log().mean()
    loss.backward()  # after the block has ended
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1].keys() == b[1].keys() and any("q_proj" in name for name in a[1])
    for name, gradient in a[1].items():
        torch.testing.assert_close(b[1][name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_equal_those_of_the_full_matrix(load_tiny, encode, role_map, attention):
    inputs = encode(2)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    expected = guided_gradients(load_tiny("eager"), inputs, roles, from_eager=True)
    assert_same_gradients(guided_gradients(load_tiny(attention), inputs, roles), expected)


def test_gradient_checkpointing_changes_nothing(load_tiny, encode, role_map):
    inputs = encode(2)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    plain = guided_gradients(load_tiny("sdpa").train(), inputs, roles)
    model = load_tiny("sdpa").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_gradients(guided_gradients(model, inputs, roles), plain)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_computes_the_same_to_the_bit(load_tiny, encode, role_map, attention):
    inputs = encode(2)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    model = load_tiny(attention)
    with torch.no_grad():
        before = model(**inputs).logits
        with capture_mass(model, roles):
            during = model(**inputs, use_cache=False).logits
        after = model(**inputs).logits
    assert torch.equal(before, during) and torch.equal(before, after)


def test_key_groups_show_every_image_token(load_tiny, encode, role_map):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    image = roles == TokenRole.IMAGE
    model = load_tiny("eager")
    with torch.no_grad():
        attentions = model(**inputs, use_cache=False, output_attentions=True).attentions
        groups = image.long().cumsum(1) * image
        with capture_mass(model, roles, key_groups=groups, num_groups=17) as captured:
            model(**inputs, use_cache=False)
    expected = torch.stack(attentions, dim=1)[..., image[0]]
    torch.testing.assert_close(captured.mass[..., 1:], expected, **CLOSE)


def test_a_step_is_freed_without_the_garbage_collector(load_tiny, encode, role_map):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    model = load_tiny("sdpa")
    gc.disable()
    try:
        with capture_mass(model, roles) as captured:
            model(**inputs, use_cache=False)
        alive = weakref.ref(captured.per_layer()[0])
        assert alive() is not None
        del captured
        assert alive() is None
    finally:
        gc.enable()


def test_misuse_is_refused(load_tiny, encode, role_map, monkeypatch):
    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    model = load_tiny("sdpa")
    with torch.no_grad():
        with pytest.raises(ValueError, match="holds one forward pass; got a second"), capture_mass(model, roles):
            model(**inputs, use_cache=False)
            model(**inputs, use_cache=False)
        with capture_mass(model, roles) as captured:
            pass
        with pytest.raises(ValueError, match="has seen no forward pass"):
            captured.mass  # noqa: B018
        for layers in ([], [4], [-5], [0, 0]):
            with pytest.raises(ValueError, match="layers must be distinct indices among the 4"):
                with capture_mass(model, roles, layers=layers):
                    pass
        with pytest.raises(ValueError, match="roles must cover every position"), capture_mass(model, roles[:, :-1]):
            model(**inputs, use_cache=False)

        cache = model(**inputs, use_cache=True).past_key_values
        step = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": cache}
        with pytest.raises(ValueError, match="Run without a key/value cache"), capture_mass(model, roles[:, :1]):
            model(**step)

        attention = type(find_decoder(model).layers[2].self_attn)
        original = attention.forward

        def bypass(self, hidden_states, *args, **kwargs):
            if self.layer_idx == 2:
                return hidden_states, None
            return original(self, hidden_states, *args, **kwargs)

        monkeypatch.setattr(attention, "forward", bypass)
        with capture_mass(model, roles) as captured:
            model(**inputs, use_cache=False)
        with pytest.raises(ValueError, match=r"layers \[2\] did not"):
            captured.mass  # noqa: B018


def test_a_model_without_a_decoder_is_refused():
    with pytest.raises(ValueError, match="the one text decoder of the model; got 0 in Linear"):
        find_decoder(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("argument", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_another_softmax_is_refused(load_tiny, encode, role_map, monkeypatch, argument):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    inputs = encode(1)
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    model = load_tiny("sdpa")
    with capture_mass(model, roles):
        pass  # installs the wrapper
    wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda *args, **kwargs: wrapped(*args, **{**kwargs, **argument}),
    )
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS["sdpa"], "_avar_capture", True, raising=False)
    with pytest.raises(ValueError, match="need a plain softmax"), torch.no_grad(), capture_mass(model, roles):
        model(**inputs, use_cache=False)
