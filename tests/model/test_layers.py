# SPDX-License-Identifier: Apache-2.0
"""Which layers have a full softmax over system and image keys, by hand, for every kind of decoder."""

from types import SimpleNamespace

import pytest

from avar_verl.model.layers import full_softmax_layers, head_size, key_value_heads, select_layers

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


def config(layers: int = 4, **fields) -> SimpleNamespace:
    return SimpleNamespace(num_hidden_layers=layers, hidden_size=128, num_attention_heads=4, **fields)


@pytest.mark.parametrize(
    "fields, full",
    [
        ({}, (0, 1, 2, 3)),
        ({"layer_types": None, "sliding_window": None}, (0, 1, 2, 3)),
        ({"layer_types": [LINEAR, LINEAR, LINEAR, FULL]}, (3,)),  # Qwen3.5
        ({"layer_types": ["conv", "conv", FULL, "conv"]}, (2,)),  # LFM2
        ({"layer_types": [SLIDING, FULL] * 2, "sliding_window": 64}, (1, 3)),  # Gemma
        ({"layer_types": ["chunked_attention", FULL] * 2, "attention_chunk_size": 64}, (1, 3)),  # Llama 4
        ({"layer_types": ["mamba", "attention"] * 2}, (1, 3)),
        ({"cross_attention_layers": [1, 3]}, (0, 2)),  # Llama 3.2 Vision
    ],
)
def test_the_default_are_layers_with_a_full_softmax(fields, full):
    assert full_softmax_layers(config(**fields)) == select_layers(config(**fields), None) == full
    assert select_layers(config(**fields), [full[-1] - 4]) == full[-1:]


@pytest.mark.parametrize(
    "fields, layers, got",
    [
        ({"layer_types": [LINEAR, FULL] * 2}, [0, 1, 2], r"linear attention .* has no softmax in layers \[0, 2\]"),
        ({"layer_types": ["conv", FULL] * 2}, [0], r"a short convolution, which has no softmax in layers \[0\]"),
        (
            {"cross_attention_layers": [1, 3]},
            [3],
            r"cross-attention, whose softmax has .* in layers \[3\]",
        ),
        (
            {"layer_types": ["sparse", FULL] * 2},
            [-2],
            r"'sparse', a kind of layer .* in layers \[2\]",
        ),
    ],
)
def test_a_layer_without_a_softmax_is_refused_with_the_reason(fields, layers, got):
    for windowed in (False, True):
        with pytest.raises(ValueError, match=rf"got {got}.*Select some of \["):
            select_layers(config(**fields), layers, windowed)


@pytest.mark.parametrize(
    "fields, got",
    [
        ({"layer_types": [SLIDING, FULL] * 2, "sliding_window": 64}, "a sliding window of 64 tokens"),
        (
            {"layer_types": ["chunked_attention", FULL] * 2, "attention_chunk_size": 32},
            "attention within chunks of 32 tokens",
        ),
    ],
)
def test_a_layer_with_a_window_is_refused_unless_it_is_captured_by_name(fields, got):
    with pytest.raises(ValueError, match=rf"got {got} in layers \[0\]. Select some of \[1, 3\]"):
        select_layers(config(**fields), [0, 1])
    assert select_layers(config(**fields), [0, 1], windowed=True) == (0, 1)


@pytest.mark.parametrize(
    "fields, got",
    [
        ({"sliding_window": 64}, "a sliding window of 64 tokens"),  # Mistral: in every layer.
        ({"attn_logit_softcapping": 50.0}, "logits that are capped at 50.0"),  # Gemma 2
        ({"model_type": "gpt_oss"}, "attention sinks"),  # InternVL3.5 on GPT-OSS
        ({"layer_types": [LINEAR] * 4}, "linear attention"),
    ],
)
def test_a_decoder_without_such_a_layer_is_refused(fields, got):
    assert full_softmax_layers(config(**fields)) == ()
    for layers in (None, [0]):
        with pytest.raises(ValueError, match=rf"{got}.* in layers \[0.*Use another model"):
            select_layers(config(**fields), layers)


def test_the_largest_head_of_the_chosen_layers():
    gemma4 = config(layer_types=[SLIDING, FULL] * 2, sliding_window=64, head_dim=256, global_head_dim=512)
    assert (head_size(gemma4, (0, 2)), head_size(gemma4, (0, 1))) == (256, 512)
    assert head_size(config(), (0,)) == 32
    assert head_size(config(head_dim=64), (0,)) == 64
    assert head_size(config(head_dim=64, qk_nope_head_dim=128, qk_rope_head_dim=64), (0,)) == 192


def test_layers_have_one_number_of_key_value_heads():
    kinds = dict(layer_types=[SLIDING, FULL] * 2, num_key_value_heads=4)
    assert key_value_heads(config(**kinds), [0, 1]) == key_value_heads(config(**kinds), []) == 4
    large = config(**kinds, attention_k_eq_v=True, num_global_key_value_heads=2)  # Gemma 4
    assert key_value_heads(large, [1, 3]) == 2 and key_value_heads(large, [0, 2]) == 4
    with pytest.raises(ValueError, match=r"one number of key/value heads; got {0: 4, 1: 2} by layer. Select layers of"):
        key_value_heads(large, [0, 1])
