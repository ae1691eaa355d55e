# SPDX-License-Identifier: Apache-2.0
"""Visual dependency against plain transformers in every family, by hand, and what must not change it.

Shape suffixes: S = positions, V = vocabulary
"""

import functools
import math
import sys
from dataclasses import replace

import pytest
import torch

from avar_verl.data.messages import read_messages
from avar_verl.model.checkpoint import Checkpoint
from avar_verl.model.corrupt import NEARLY_ZERO
from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import _chat_text
from avar_verl.roles import TokenRole
from avar_verl.tools.rows import Conversation
from avar_verl.tools.vas.score import Scorer, image_features
from tests.model.families.tiny import SPECS, sample_messages
from tests.tools.vas.conftest import assert_same, conversation

every_family = pytest.mark.parametrize("model_type", FAMILIES)


def answered_turns(model_type: str) -> int:
    """Templates that drop the thoughts of earlier turns write other responses than the row's, which is refused."""
    return 1 if "{think}" in SPECS[model_type].reply else 2


def of(model_type: str, *args, **kwargs) -> Conversation:
    """A conversation whose answers the family's prompts end before."""
    return replace(conversation(*args, **kwargs), template_kwargs=SPECS[model_type].template_kwargs)


@pytest.fixture(scope="module")
def ready_checkpoint(family_path, family_checkpoint):
    """`family_checkpoint`, or where a family prepares its models one that `Checkpoint.load` has prepared."""

    @functools.cache
    def load(model_type: str) -> Checkpoint:
        prepares = get_family(model_type).prepare is not None
        return Checkpoint.load(family_path(model_type)) if prepares else family_checkpoint(model_type)

    return load


def only(checkpoint: Checkpoint, corruption: str = "blank", **settings) -> Scorer:
    return Scorer(checkpoint, queries=(), corruption=corruption, **settings)


def swapped_images(checkpoint: Checkpoint, images: list) -> tuple[list, dict]:
    """Other pictures of the same sizes, and their features."""
    others = [image.transpose(0).point(lambda value: 255 - value) for image in images]
    return others, image_features(checkpoint.processor, others)


@torch.no_grad()
def reference(checkpoint: Checkpoint, one: Conversation, corruption: str) -> torch.Tensor:
    """(S,) float64 clipped difference of log-probabilities of all tokens, by the processor and the model alone."""
    processor = checkpoint.processor
    text = _chat_text(processor, read_messages(one.answered(), markers=False))
    add_bos = not (processor.tokenizer.bos_token and text.startswith(processor.tokenizer.bos_token))
    settings = {"text": [text], "add_special_tokens": add_bos, "return_tensors": "pt"}
    inputs = dict(processor(images=one.images, **settings))
    if corruption == "blank":
        blank = torch.zeros_like(inputs["pixel_values"])
        # A tile of zeros is padding to Idefics3.
        mask = inputs.get("pixel_attention_mask", blank[0])
        blank += NEARLY_ZERO * mask[:, :, None] if "pixel_attention_mask" in inputs and mask.dim() > 2 else 0
        if "image_position_ids" in inputs:  # Gemma 4, but for patches of padding.
            blank += 0.5 * (inputs["image_position_ids"] >= 0).all(-1, keepdim=True)
        other = {**inputs, "pixel_values": blank}
    else:
        other = dict(processor(images=swapped_images(checkpoint, one.images)[0], **settings))
    ids_S = inputs["input_ids"][0]
    assert torch.equal(other["input_ids"][0], ids_S)
    real_SV, other_SV = (checkpoint.model(**one).logits[0].double().log_softmax(-1) for one in (inputs, other))
    difference_S = (real_SV - other_SV)[:-1].gather(1, ids_S[1:, None])[:, 0].clamp(-5, 5)
    return torch.cat([torch.zeros(1), difference_S])


@pytest.mark.e2e
@every_family
@pytest.mark.parametrize("corruption", ["blank", "swap"])
def test_every_token_is_that_of_plain_transformers(model_type, corruption, ready_checkpoint):
    checkpoint = ready_checkpoint(model_type)
    scorer = only(checkpoint, corruption)
    for one in (of(model_type, 1), of(model_type, 2, answered_turns(model_type), seed=1)):
        [sample] = scorer.prepare([one])
        partner = swapped_images(checkpoint, one.images)[1] if corruption == "swap" else None
        [record] = scorer.score([sample], [partner])
        expected = reference(checkpoint, one, corruption)[sample.roles_S == TokenRole.RESPONSE].tolist()
        assert record["dependency"] == pytest.approx(expected, abs=1e-5)
        assert max(map(abs, expected)) > 1e-3 and record["skipped"] == {}


def without_chunks(model: torch.nn.Module, monkeypatch) -> None:
    """Compute gated DeltaNet token by token: transformers' chunks of 64 begin elsewhere under left padding, and the
    rounding of float32 with them (up to 2e-5 in a log-probability).
    """
    for module in model.modules():
        if hasattr(module, "chunk_gated_delta_rule"):
            rule = vars(sys.modules[type(module).__module__])["torch_recurrent_gated_delta_rule"]
            by_token = functools.partial(lambda rule, *args, cu_seqlens, **kwargs: rule(*args, **kwargs), rule)
            monkeypatch.setattr(module, "chunk_gated_delta_rule", by_token)


@pytest.mark.e2e
@every_family
def test_batches_and_padding_change_nothing(model_type, ready_checkpoint, monkeypatch):
    """Beside longer samples, ones without an image, and ones without a response."""
    checkpoint = ready_checkpoint(model_type)
    without_chunks(checkpoint.model, monkeypatch)
    # Under left padding, transformers loses the masks of cross-attention.
    sides = ("right",) if model_type == "mllama" else ("right", "left")
    conversations = [
        of(model_type, 1),
        of(model_type, 2, answered_turns(model_type), seed=1),
        of(model_type, 0, seed=2),
        of(model_type, 1, answered=False),
    ]
    for side in sides:
        scorer = only(checkpoint, padding_side=side)
        samples = scorer.prepare([*conversations, of(model_type, 1, seed=3)])
        together = scorer.score(samples)
        alone = [record for sample in samples for record in scorer.score([sample])]
        for one, other in zip(together, alone, strict=True):
            assert one["skipped"] == other["skipped"]
            assert one.get("dependency") == pytest.approx(other.get("dependency"), abs=1e-5)
        reasons = [record["skipped"].get("dependency") for record in together]
        assert reasons == [None, None, "no image", "no response", None]


def test_masses_and_dependency_share_a_pass(family_checkpoint):
    """Measured together or alone, the numbers are the same, and dependency costs one pass more."""
    checkpoint = family_checkpoint("qwen3_vl")
    conversations = [conversation(1), conversation(1, system=False, seed=1), conversation(0), conversation(2, seed=2)]
    both, masses, dependency = Scorer(checkpoint, corruption="blank"), Scorer(checkpoint), only(checkpoint)
    passes = []
    handle = checkpoint.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        counts = []
        records = {}
        for name, scorer in (("both", both), ("masses", masses), ("dependency", dependency)):
            passes.clear()
            records[name] = scorer.score(scorer.prepare(conversations))
            counts.append(len(passes))
    finally:
        handle.remove()
    assert counts == [2, 1, 2]
    for one, mass, use in zip(records["both"], records["masses"], records["dependency"], strict=True):
        assert one.get("dependency") == pytest.approx(use.get("dependency"), abs=1e-5)
        assert one["skipped"] == {**mass["skipped"], **use["skipped"]}
        one = {key: value for key, value in one.items() if key in mass}
        assert_same({**one, "skipped": {}}, {**mass, "skipped": {}})
    # Without a system turn there is no mass, but a dependency.
    assert records["both"][1]["skipped"] == {"user": "no system turn", "response": "no system turn"}
    assert len(records["both"][1]["dependency"]) > 3


# ---- by hand ---------------------------------------------------------------------------------------------------


def test_an_answer_before_the_image_has_none(ready_checkpoint):
    """Two questions, the image with the second one: every token of the first answer has exactly 0."""
    for model_type in ("qwen2_5_vl", "gemma3", "mllama"):
        first, second = sample_messages(0, system=True), sample_messages(1, seed=1)
        messages = read_messages([*first, *second], markers=False)
        answer = messages.pop()["content"]
        scorer = only(ready_checkpoint(model_type))
        [sample] = scorer.prepare([Conversation(messages, answer, turns=True)])
        [record] = scorer.score([sample])
        is_response_S = sample.roles_S == TokenRole.RESPONSE
        gap = next(
            at
            for at, (here, there) in enumerate(zip(is_response_S.tolist(), is_response_S.tolist()[1:], strict=False))
            if here and not there
        )
        count = int(is_response_S[: gap + 1].sum())
        assert count > 3 and record["dependency"][:count] == [0.0] * count
        assert max(map(abs, record["dependency"][count:])) > 1e-3


@pytest.mark.parametrize("gain, clipped", [(3.0, False), (200.0, True)])
def test_a_model_that_sees_one_word(gain, clipped, family_path):
    """A model blind but for `gain` on the logit of one word where there is a picture: this word has
    gain - log(1 + p (e^gain - 1)), every other token -log(1 + p (e^gain - 1)), p its probability there, clipped to 5.
    Without the gain, every token has 0."""
    checkpoint = Checkpoint.load(family_path("qwen2_5_vl"))
    tokenizer, model = checkpoint.processor.tokenizer, checkpoint.model
    scorer, one = only(checkpoint), conversation(1)
    [sample] = scorer.prepare([one])
    is_response_S = sample.roles_S == TokenRole.RESPONSE
    ids = sample.rendered.ids_S[is_response_S].tolist()
    word = next(token for token in ids if tokenizer.decode([token]).strip() == "shows")
    state = {"sees": False}
    model.model.visual.register_forward_pre_hook(lambda _m, args: state.update(sees=bool(args[0].any())))

    def blind(_module, _args, output):
        output.pooler_output = torch.zeros_like(output.pooler_output)
        return output

    model.model.visual.register_forward_hook(blind)
    plain = scorer.score([sample])[0]["dependency"]
    assert plain == [0.0] * len(ids)

    with torch.no_grad():
        logits_SV = model(**checkpoint.collate([sample.rendered]), use_cache=False).logits[0].double()
    p_T = logits_SV.softmax(-1)[is_response_S.nonzero()[:, 0] - 1, word].tolist()

    def sees_the_word(_module, _args, output):
        output.logits[..., word] += gain * state["sees"]
        return output

    model.register_forward_hook(sees_the_word)
    [record] = scorer.score([sample])
    for token, p, value in zip(ids, p_T, record["dependency"], strict=True):
        loss = gain + math.log(p) if clipped else math.log1p(p * math.expm1(gain))  # The 1 is lost in e^200.
        expected = min(5.0, max(-5.0, (gain if token == word else 0.0) - loss))
        assert value == pytest.approx(expected, abs=1e-4)
    values = dict(zip(ids, record["dependency"], strict=True))
    assert values[word] > 1 and all(value <= 0 for token, value in values.items() if token != word)


def test_a_model_that_reads_no_image_has_none(family_path):
    """Llama 3.2 Vision with closed gates."""
    checkpoint = Checkpoint.load(family_path("mllama"))
    for name, parameter in checkpoint.model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            parameter.data.zero_()
    scorer = only(checkpoint)
    [record] = scorer.score(scorer.prepare([conversation(1)]))
    assert record["dependency"] == [0.0] * len(record["dependency"]) and len(record["dependency"]) > 3


# ---- rules -----------------------------------------------------------------------------------------------------


def test_what_is_refused(family_path, family_checkpoint):
    checkpoint = family_checkpoint("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"corruption must be one of \('blank', 'swap'\); got 'noise'"):
        only(checkpoint, "noise")
    swap = only(checkpoint, "swap")
    samples = swap.prepare([conversation(1), conversation(0)])
    handle = checkpoint.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        with pytest.raises(ValueError, match="corruption=swap needs the images of another sample; got none"):
            swap.score(samples)
        wide = image_features(checkpoint.processor, [conversation(1).images[0].resize((224, 112))])
        with pytest.raises(ValueError, match="images that are swapped must have the same shapes and grids"):
            swap.score(samples, [wide, None])
        [record] = swap.score(samples[1:])  # Nothing to swap.
        assert record["skipped"] == {"dependency": "no image"}
    finally:
        handle.remove()
    other = Checkpoint.load(family_path("qwen2_5_vl"))
    other.processor.image_processor.do_normalize = False
    with pytest.raises(ValueError, match="do_normalize=False"):
        only(other)
    assert only(other, "swap").corruption == "swap"
