# SPDX-License-Identifier: Apache-2.0
"""The intervention in transformers, against the formula on the full matrix, for every family with self-attention."""

import contextlib
import dataclasses
import functools
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from avar_verl.attention import capture_mass
from avar_verl.attention.capture import find_decoder
from avar_verl.intervention.spec import InterventionSpec
from avar_verl.intervention.transformers_hook import check_decoder, generate, intervene
from avar_verl.model.checkpoint import Checkpoint
from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import collate, render
from avar_verl.roles import RoleMap, TokenRole
from avar_verl.tools.rows import conversation
from avar_verl.tools.vas.score import Scorer
from tests.intervention.reference import attention_of, reference
from tests.model.families import tiny

SELF_ATTENTION = sorted(model_type for model_type in FAMILIES if not get_family(model_type).cross_attention)
SELF_ATTENTION.append("gemma4_large")  # Fewer heads of keys in the layers without a window.
BOTH = "alpha_img=0.35,alpha_sys=0.6"
PART = "alpha_img=0.35,alpha_sys=0.6,layers=1,heads=2-3"
NEW_TOKENS = 4
GREEDY = {
    "max_new_tokens": NEW_TOKENS,
    "min_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="session")
def samples(family_processor):
    """`samples(model_type, answered)` -> three rendered conversations: with one image, with two, without."""

    @functools.cache
    def make(model_type: str, answered: bool):
        conversations = [
            tiny.sample_messages(1, system=True, answered=answered),
            tiny.sample_messages(2, system=True, turns=2, seed=3, answered=answered),
            tiny.sample_messages(0, system=True, seed=5, answered=answered),
        ]
        processor = family_processor(model_type)
        return [render(processor, messages, add_generation_prompt=not answered) for messages in conversations]

    return make


@pytest.fixture(scope="session")
def role_map_of(family_model, family_processor):
    return functools.cache(
        lambda model_type: RoleMap.from_pretrained(family_processor(model_type), family_model(model_type).config)
    )


def batch(model, rendered, side="right"):
    config = model.config
    return collate(
        get_family(config.model_type), config, rendered, pad_id=config.text_config.pad_token_id or 0, padding_side=side
    )


@pytest.mark.e2e
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", SELF_ATTENTION)
def test_logits_are_those_of_the_formula(model_type, attention, family_model, samples, role_map_of):
    model = family_model(model_type)
    inputs = batch(model, samples(model_type, True), "right" if attention == "sdpa" else "left")
    real = inputs["attention_mask"].bool()
    roles = role_map_of(model_type)(inputs["input_ids"], inputs["attention_mask"])
    for spec in (BOTH, PART):
        expected, _ = reference(model, inputs, roles, spec)
        with attention_of(model, attention), torch.no_grad():
            plain = model(**inputs, use_cache=False).logits
            with intervene(model, roles, spec):
                logits = model(**inputs, use_cache=False).logits
            again = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(logits[real], expected[real], **CLOSE)
        assert float((logits - plain)[real].abs().max()) > 1e-2, "the test cannot fail"
        assert torch.equal(plain, again)


def reference_of_prompt(model, prompt, new_ids, role_map, spec=BOTH):
    """Logits that predict the tokens after the prompt, by the formula; these tokens are RESPONSE."""
    roles_1P = role_map(prompt.ids_S[None], torch.ones_like(prompt.ids_S)[None])
    forced = batch(model, [dataclasses.replace(prompt, ids_S=torch.cat([prompt.ids_S, new_ids]))])
    roles_1S = torch.nn.functional.pad(roles_1P, (0, len(new_ids)), value=int(TokenRole.RESPONSE))
    logits, _ = reference(model, forced, roles_1S, spec)
    return logits[0, -len(new_ids) - 1 : -1]


@pytest.mark.parametrize("model_type", SELF_ATTENTION)
def test_generated_tokens_follow_the_formula(model_type, family_model, samples, role_map_of):
    """In one batch padded on the left, with a cache, as every sample by itself in one pass without one."""
    model, role_map, prompts = family_model(model_type), role_map_of(model_type), samples(model_type, False)
    inputs = batch(model, prompts, "left")
    settings = GREEDY | {"suppress_tokens": list(role_map.image_token_ids)}
    together = generate(model, role_map, BOTH, inputs, **settings)
    plain = model.generate(**inputs, **settings)
    assert float((together.logits[0] - plain.logits[0]).abs().max()) > 1e-2, "the test cannot fail"
    for row, prompt in enumerate(prompts):
        expected = reference_of_prompt(model, prompt, together.sequences[row, -NEW_TOKENS:], role_map)
        ours = torch.stack([step[row] for step in together.logits])
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.fixture
def one(family_model, samples, role_map_of):
    """`one(model_type)` -> a model, its role map and a prompt with an image."""
    return lambda model_type: (family_model(model_type), role_map_of(model_type), samples(model_type, False)[1])


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_every_kind_of_cache(model_type, cache, one):
    """Gemma 3's window is shorter than the prompt, so its sliding layers read only the last keys."""
    model, role_map, prompt = one(model_type)
    inputs = batch(model, [prompt])
    assert model_type != "gemma3" or inputs["input_ids"].shape[1] > model.config.text_config.sliding_window
    settings = GREEDY | {"suppress_tokens": list(role_map.image_token_ids)}
    spec = f"{BOTH},layers=0-1"
    expected = generate(model, role_map, spec, inputs, **settings)
    out = generate(model, role_map, spec, inputs, **settings, **cache)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), **CLOSE)


def test_a_static_sliding_cache_that_is_not_full(family_model, samples, role_map_of):
    model, role_map, prompt = family_model("gemma3"), role_map_of("gemma3"), samples("gemma3", False)[2]
    inputs = batch(model, [prompt])
    assert inputs["input_ids"].shape[1] + NEW_TOKENS < model.config.text_config.sliding_window
    spec = "alpha_sys=0.6,layers=0-1"
    out = generate(model, role_map, spec, inputs, **GREEDY, cache_implementation="static")
    expected = reference_of_prompt(model, prompt, out.sequences[0, -NEW_TOKENS:], role_map, spec)
    torch.testing.assert_close(torch.stack(out.logits)[:, 0], expected, **CLOSE)


def test_a_prompt_in_chunks(one):
    model, role_map, prompt = one("qwen2_5_vl")
    inputs = batch(model, [prompt])
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    embeddings = model.get_input_embeddings()(inputs["input_ids"])  # Without the image's features, which are no matter.
    with torch.no_grad(), intervene(model, roles, BOTH):
        whole = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        cache, parts = DynamicCache(config=model.config.text_config), []
        for chunk in embeddings.split(7, dim=1):
            out = model.model.language_model(inputs_embeds=chunk, past_key_values=cache, use_cache=True)
            parts.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


@pytest.mark.parametrize("copies", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams(copies, one, samples):
    """Beams of two prompts, each by the score that the formula gives it."""
    model, role_map, _ = one("qwen2_5_vl")
    prompts = samples("qwen2_5_vl", False)[:2]
    inputs = batch(model, prompts, "left")
    out = generate(
        model,
        role_map,
        BOTH,
        inputs,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        **copies,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    each = copies.get("num_return_sequences", 1)
    assert len(out.sequences) == 2 * each
    for row, ids in enumerate(out.sequences):
        new_ids = ids[-3:]
        logits = reference_of_prompt(model, prompts[row // each], new_ids, role_map)
        score = logits.log_softmax(-1).gather(1, new_ids[:, None]).sum()
        torch.testing.assert_close(out.sequences_scores[row], score, atol=1e-4, rtol=0)


def test_flex_attention(one, samples):
    model, role_map, _ = one("qwen2_5_vl")
    inputs = batch(model, samples("qwen2_5_vl", True)[:2])
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    expected, _ = reference(model, inputs, roles, BOTH)
    # Without a compiler flex attention is what it computes, and spares two minutes.
    with attention_of(model, "flex_attention"), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        with intervene(model, roles, BOTH):
            logits = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], **CLOSE)


@pytest.mark.parametrize("spec", ["alpha_img=0,alpha_sys=0,layers=1,heads=2-3", InterventionSpec()])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_to_do_is_nothing_done(spec, attention, one):
    model, role_map, prompt = one("qwen2_5_vl")
    inputs = batch(model, [prompt])
    with attention_of(model, attention):
        plain = model.generate(**inputs, **GREEDY)
        out = generate(model, role_map, spec, inputs, **GREEDY)
        with intervene(model, role_map, spec):
            assert not find_decoder(model)._forward_pre_hooks and not model._forward_pre_hooks
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, out.logits, strict=True))


def test_the_cache_holds_the_keys_of_the_model(one):
    model, role_map, prompt = one("qwen2_5_vl")
    inputs = batch(model, [prompt])
    with torch.no_grad():
        with intervene(model, role_map, "alpha_img=0.35,layers=0"):
            inside = model(**inputs, use_cache=True).past_key_values
        outside = model(**inputs, use_cache=True).past_key_values
    assert torch.equal(inside.layers[0].keys, outside.layers[0].keys)
    assert not torch.equal(inside.layers[1].keys, outside.layers[1].keys)  # Whose input has changed.


def test_positions_behind_the_roles_are_not_scaled(one):
    """Here they are text, and a role map says the same as the roles that it gives."""
    model, role_map, prompt = one("qwen2_5_vl")
    inputs = batch(model, [prompt])
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    behind = int((roles == TokenRole.IMAGE).nonzero()[-1, 1]) + 1
    with torch.no_grad():
        logits = []
        for given in (roles, roles[:, :behind], role_map):
            with intervene(model, given, BOTH):
                logits.append(model(**inputs, use_cache=False).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("order", ["capture inside", "capture around"])
def test_masses_are_those_of_the_scaled_keys(attention, order, one, samples):
    model, role_map, _ = one("qwen2_5_vl")
    inputs = batch(model, samples("qwen2_5_vl", True))
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    _, weights = reference(model, inputs, roles, PART)
    onehot = torch.nn.functional.one_hot(roles, len(TokenRole)).float()
    contexts = [lambda: intervene(model, roles, PART), lambda: capture_mass(model, roles)]
    with attention_of(model, attention), torch.no_grad():
        with contextlib.ExitStack() as stack:
            entered = [stack.enter_context(make()) for make in contexts[:: 1 if order == "capture inside" else -1]]
            model(**inputs, use_cache=False)
        captured = entered[1 if order == "capture inside" else 0]
        with capture_mass(model, roles) as plain:
            model(**inputs, use_cache=False)
    real = inputs["attention_mask"].bool()[:, None, None, :, None]
    torch.testing.assert_close(captured.mass * real, weights @ onehot[:, None, None] * real, **CLOSE)
    assert float((captured.mass - plain.mass).abs().max()) > 1e-2, "the test cannot fail"


def test_vas_of_an_intervention(one, family_processor):
    """What measures a checkpoint measures it under an intervention, when it runs inside the block."""
    model, role_map, _ = one("qwen2_5_vl")
    image = tiny.sample_images(1)[0]
    checkpoint = Checkpoint(model, family_processor("qwen2_5_vl"), role_map)
    row = {"question": "What does the top left show?", "response": "<think>cat</think><answer>cat</answer>"}
    scorer = Scorer(checkpoint)
    samples = scorer.prepare([conversation({**row, "image": image})])
    [plain] = scorer.score(samples)
    with intervene(model, role_map, BOTH):
        [changed] = scorer.score(samples)
    assert plain["user"]["ratio"] != changed["user"]["ratio"]
    assert [plain] == scorer.score(samples)


def test_nothing_stays_behind(one):
    model, role_map, prompt = one("qwen2_5_vl")
    decoder = find_decoder(model)
    with pytest.raises(RuntimeError, match="on purpose"), intervene(model, role_map, BOTH):
        assert decoder._forward_pre_hooks and decoder._forward_hooks and model._forward_pre_hooks
        raise RuntimeError("on purpose")
    assert not (decoder._forward_pre_hooks or decoder._forward_hooks or model._forward_pre_hooks)
    wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with intervene(model, role_map, BOTH):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is wrapped  # Wrapped once.


def test_cross_attention_is_refused(family_model):
    model = family_model("mllama")
    with pytest.raises(ValueError, match="got cross-attention layers .*whose softmax has only image keys"):
        with intervene(model, torch.zeros(1, 3, dtype=torch.long), BOTH):
            pass


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn_logit_softcapping": 30.0}, "got logits that are capped at 30.0 in layers [0]"),
        (
            {"_attn_implementation": "paged|sdpa"},
            "needs the keys of whole samples; got attn_implementation='paged|sdpa'",
        ),
    ],
)
def test_attention_that_key_rescaling_does_not_fit_is_refused(change, message):
    config = SimpleNamespace(_attn_implementation="sdpa", num_hidden_layers=1)

    def check():
        check_decoder(SimpleNamespace(config=config))
        InterventionSpec(alpha_img=1.0).chosen_layers(config)

    check()
    vars(config).update(change)
    with pytest.raises(ValueError, match=re.escape(message)):
        check()


def test_misuse_is_refused(one, monkeypatch):
    model, role_map, prompt = one("qwen2_5_vl")
    inputs = batch(model, [prompt])
    roles = role_map(inputs["input_ids"], inputs["attention_mask"])
    decoder = find_decoder(model)
    for spec, message in (
        ("alpha_img=1,layers=9", "layers must be among"),
        ("alpha_img=1,heads=0", "together: 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message), intervene(model, roles, spec):
            pass
    with torch.no_grad():
        with pytest.raises(ValueError, match="one row for every row of the batch; got 2 for 1"):
            with intervene(model, roles.repeat(2, 1), BOTH):
                model(**inputs)
        with pytest.raises(ValueError, match="reads roles from input_ids; got a pass without them"):
            with intervene(model, role_map, BOTH):
                model(inputs_embeds=torch.zeros(1, 3, 128))
        with pytest.raises(ValueError, match=r"padding from a \(B, S\) attention_mask; got dict"):
            with intervene(model, role_map, BOTH):
                model(input_ids=inputs["input_ids"], attention_mask={"full_attention": None})
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="got one that goes on from a filled cache"):
            with intervene(model, role_map, BOTH):
                model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
        for layer in cache.layers:
            layer.crop(-2)
        monkeypatch.setattr(type(cache), "get_seq_length", lambda self, layer_idx=0: roles.shape[1])
        with pytest.raises(ValueError, match=rf"must read every key so far; got {roles.shape[1] - 1} of"):
            with intervene(model, roles, BOTH):
                decoder(inputs_embeds=torch.zeros(1, 1, 128), past_key_values=cache)


def test_attention_that_bypasses_the_interface_is_refused(one, monkeypatch):
    model, role_map, prompt = one("qwen2_5_vl")
    inputs = batch(model, [prompt])
    attention = type(find_decoder(model).layers[1].self_attn)
    original = attention.forward

    def bypass(self, hidden_states, *args, **kwargs):
        return (hidden_states, None) if self.layer_idx == 1 else original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", bypass)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"layers \[1\] did not"), intervene(model, role_map, BOTH):
            model(**inputs, use_cache=False)
        with intervene(model, role_map, "alpha_img=0.35,layers=0"):  # It is not asked for.
            model(**inputs, use_cache=False)
