# SPDX-License-Identifier: Apache-2.0
"""Records against full attention matrices, and what must not change them."""

import math
from dataclasses import replace

import pytest
import torch

from avar_verl.model.checkpoint import Checkpoint, generate_ids
from avar_verl.model.families import FAMILIES
from avar_verl.model.render import render
from avar_verl.roles import TokenRole
from avar_verl.tools.rows import Conversation
from avar_verl.tools.vas.score import BIN_STARTS, SUMS, Scorer, measurable_layers
from tests.tools.vas.conftest import assert_same, attention_matrix, conversation

# Gemma 3's other layer has a window.
MEASURED = tuple(name for name in FAMILIES if name != "mllama")


def reference(checkpoint, sample, layers) -> dict:
    """The record's numbers, query by query from the full matrix, with images told apart as runs of image tokens."""
    matrix_LHSS = attention_matrix(checkpoint, sample, layers)
    roles = sample.roles_S.tolist()
    system = [at for at, role in enumerate(roles) if role == TokenRole.SYSTEM]
    images: list[list[int]] = []
    for at, role in enumerate(roles):
        if role == TokenRole.IMAGE:
            if roles[at - 1] != TokenRole.IMAGE:
                images.append([])
            images[-1].append(at)
    out = {}
    for name, wanted in (("user", TokenRole.USER), ("response", TokenRole.RESPONSE)):
        queries = [at for at, role in enumerate(roles) if role == wanted]
        rows = []
        for query in queries:
            by_image = [matrix_LHSS[:, :, query, columns].sum(-1) for columns in images]
            image, system_mass = sum(by_image), matrix_LHSS[:, :, query, system].sum(-1)
            share = image / (image + system_mass)
            row = {"ratio": image / system_mass, "share": share, "image": image, "system": system_mass}
            rows.append({**row, "by_image": by_image})
        part = {key: sum(row[key] for row in rows).tolist() for key in SUMS}
        part["queries"] = len(queries)
        part["before_image"] = sum(query < images[0][0] for query in queries)
        number = range(len(images))
        part["image_mass"] = [float(sum(row["by_image"][i].mean() for row in rows)) for i in number]
        part["image_ratio"] = [float(sum((row["by_image"][i] / row["system"]).mean() for row in rows)) for i in number]
        if name == "response":
            bins = [max(b for b, start in enumerate(BIN_STARTS) if start <= place) for place in range(len(queries))]
            part["positions"] = {"queries": [bins.count(b) for b in range(bins[-1] + 1)]}
            for key in SUMS:
                part["positions"][key] = [
                    sum(row[key].mean(1) for row, at in zip(rows, bins, strict=True) if at == b).tolist()
                    for b in range(bins[-1] + 1)
                ]
        out[name] = part
    return {"images": [len(columns) for columns in images], "skipped": {}, **out}


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3", "internvl", "llava_onevision"])
def test_every_number_is_that_of_the_full_matrix(model_type, family_checkpoint, eager_checkpoint):
    scorer = Scorer(family_checkpoint(model_type))
    samples = scorer.prepare([conversation(1), conversation(2, 2, seed=1)])
    records = scorer.score(samples)
    assert [len(record["images"]) for record in records] == [1, 2]
    for sample, record in zip(samples, records, strict=True):
        assert_same(record, reference(eager_checkpoint(model_type), sample, scorer.layers))


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3", "internvl", "llava_next", "smolvlm", "glm4v"])
def test_batches_and_padding_change_nothing(model_type, family_checkpoint):
    checkpoint = family_checkpoint(model_type)
    right, left = (Scorer(checkpoint, padding_side=side) for side in ("right", "left"))
    samples = right.prepare([conversation(1), conversation(2, 2, seed=1), conversation(1, seed=2)])
    alone = [record for sample in samples for record in right.score([sample])]
    for together in (right.score(samples), left.score(samples)):
        for one, other in zip(alone, together, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "llava_next"])
def test_the_parts_of_images_add_up(model_type, family_checkpoint):
    """A conversation of three images: their parts are the whole, and each has the tokens that it has by itself."""
    scorer = Scorer(family_checkpoint(model_type))
    [record] = scorer.score(scorer.prepare([conversation(3, seed=1)]))
    assert len(record["images"]) == 3 and len(set(record["images"])) > 1  # Shapes differ.
    for name in ("user", "response"):
        whole = torch.tensor(record[name]["image"]).mean(), torch.tensor(record[name]["ratio"]).mean()
        parts = sum(record[name]["image_mass"]), sum(record[name]["image_ratio"])
        assert parts == pytest.approx([float(value) for value in whole], rel=1e-6)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_responses_given_as_ids_score_as_their_text(model_type, family_checkpoint):
    """As vLLM returns them; the answer's closing token and what the template writes after it are part of the ids."""
    checkpoint = family_checkpoint(model_type)
    scorer, text = Scorer(checkpoint), conversation(1, 2, turns=False)
    [sample] = scorer.prepare([text])
    prompt = render(checkpoint.processor, text.prompt, add_generation_prompt=True)
    ids = sample.rendered.ids_S[len(prompt.ids_S) :].tolist()
    assert sample.rendered.ids_S[: len(prompt.ids_S)].tolist() == prompt.ids_S.tolist() and len(ids) > 5
    [from_ids] = scorer.prepare([Conversation(text.prompt, None, ids, False, {})])
    assert from_ids.roles_S.tolist() == sample.roles_S.tolist()
    assert_same(scorer.score([from_ids])[0], scorer.score([sample])[0], rel=1e-9)


@pytest.mark.parametrize("model_type", MEASURED)
def test_generated_responses_are_scored_as_their_ids(model_type, family_checkpoint):
    """Generation in a left-padded batch of unequal prompts, in every family."""
    checkpoint = family_checkpoint(model_type)
    prompts = [conversation(1, answered=False), conversation(2, answered=False, seed=1)]
    generating, scorer = Scorer(checkpoint, max_new_tokens=6), Scorer(checkpoint)
    generated = generating.prepare(prompts)
    alone = [generating.prepare([one])[0].response_ids for one in prompts]
    assert [sample.response_ids for sample in generated] == alone
    assert all(1 <= len(ids) <= 6 for ids in alone)
    given = [Conversation(one.prompt, None, ids, True, {}) for one, ids in zip(prompts, alone, strict=True)]
    for one, other in zip(generating.score(generated), scorer.score(scorer.prepare(given)), strict=True):
        assert one["response"]["queries"] in range(1, 7)
        assert_same(one, other)


def test_a_response_ends_with_the_token_that_stopped_it(family_checkpoint):
    checkpoint = family_checkpoint("qwen2_vl")
    prompt = render(checkpoint.processor, conversation(1, answered=False).prompt, add_generation_prompt=True)
    [free] = generate_ids(checkpoint, [prompt], 5)
    config = checkpoint.model.generation_config
    before = config.eos_token_id
    config.eos_token_id = [free[2]]
    try:
        # Beside a longer one, whose length the stopped row is filled up to.
        other = render(checkpoint.processor, conversation(1, answered=False, seed=3).prompt, add_generation_prompt=True)
        stopped, _ = generate_ids(checkpoint, [prompt, other], 5)
    finally:
        config.eos_token_id = before
    assert stopped == free[: free.index(free[2]) + 1] and len(stopped) < len(free)


def test_image_placeholders_are_never_generated(family_checkpoint):
    """Even by a model that would write nothing else."""
    checkpoint = family_checkpoint("qwen2_5_vl")
    placeholders = list(checkpoint.role_map.image_token_ids)

    def wants_images(_module, _args, output):
        output.logits[..., placeholders] += 1e4
        return output

    prompt = render(checkpoint.processor, conversation(1, answered=False).prompt, add_generation_prompt=True)
    handle = checkpoint.model.register_forward_hook(wants_images)
    try:
        [ids] = generate_ids(checkpoint, [prompt], 4)
    finally:
        handle.remove()
    assert ids and not set(ids) & set(placeholders)


def test_only_the_last_turn_of_a_prompt_is_a_response(family_checkpoint):
    """Rows of `messages` count every assistant turn, rows of `prompt` the one that was rolled out."""
    scorer = Scorer(family_checkpoint("qwen2_5_vl"))
    both, last = (scorer.prepare([conversation(1, 2, turns=turns)])[0] for turns in (True, False))
    one_turn = scorer.prepare([conversation(1, 1)])[0]
    first = (one_turn.roles_S == TokenRole.RESPONSE).sum()
    both_R, last_R = both.roles_S == TokenRole.RESPONSE, last.roles_S == TokenRole.RESPONSE
    assert both_R.sum() == last_R.sum() + first and both_R[last_R].all()
    prompt_only = scorer.prepare([conversation(1, 2, turns=False, answered=False)])[0]
    assert not (prompt_only.roles_S == TokenRole.RESPONSE).any()


def test_samples_without_vas_say_why(family_checkpoint):
    """Qwen3-VL's template writes no system turn of its own. Nothing that is left out changes the others."""
    scorer = Scorer(family_checkpoint("qwen3_vl"))
    conversations = [conversation(1), conversation(0), conversation(1, system=False), conversation(1, answered=False)]
    records = scorer.score(scorer.prepare(conversations))
    both = dict.fromkeys(("user", "response"))
    assert [record["skipped"] for record in records] == [
        {},
        {name: "no image" for name in both},
        {name: "no system turn" for name in both},
        {"response": "no response"},
    ]
    assert [sorted({"user", "response"} & set(record)) for record in records] == [
        ["response", "user"],
        [],
        [],
        ["user"],
    ]
    assert_same(scorer.score(scorer.prepare(conversations[:1]))[0], records[0])


def test_nothing_to_measure_runs_no_model(family_checkpoint):
    scorer = Scorer(family_checkpoint("qwen3_vl"))
    handle = scorer.checkpoint.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        [record] = scorer.score(scorer.prepare([conversation(0)]))
    finally:
        handle.remove()
    assert record["skipped"] == {"user": "no image", "response": "no image"}


def test_one_query_role_and_some_layers(family_checkpoint):
    checkpoint = family_checkpoint("qwen2_5_vl")
    full = Scorer(checkpoint)
    part = Scorer(checkpoint, queries=("user",), layers=(-1, 0))
    samples = full.prepare([conversation(1)])
    [whole], [some] = full.score(samples), part.score(samples)
    assert part.layers == (0, 3) and "response" not in some
    assert_same({"ratio": [whole["user"]["ratio"][0], whole["user"]["ratio"][3]]}, {"ratio": some["user"]["ratio"]})


def test_half_precision_is_near(family_path, family_checkpoint):
    half = Checkpoint.load(family_path("qwen2_5_vl"), dtype=torch.bfloat16)
    shares = []
    for checkpoint in (family_checkpoint("qwen2_5_vl"), half):
        scorer = Scorer(checkpoint)
        [record] = scorer.score(scorer.prepare([conversation(1)]))
        shares.append(torch.tensor(record["response"]["share"]).mean() / record["response"]["queries"])
    assert half.model.dtype == torch.bfloat16
    assert 0 < abs(shares[0] - shares[1]) < 0.005


def test_a_vanished_system_mass_is_inf_in_its_own_bin_alone(family_checkpoint):
    """Keys of the system turn pushed out of reach in one head: no number is made up, and none spreads."""
    scorer = Scorer(family_checkpoint("qwen2_5_vl"))
    [sample] = scorer.prepare([conversation(1)])
    [sums_LHGK], _ = scorer._pass([sample], masses=True, likelihood=False)
    sums_LHGK[0, 0, 2, 0] = math.inf
    record = scorer._parts(sample, sums_LHGK)
    assert record["response"]["ratio"][0][0] == math.inf
    ratios = [value for row in record["response"]["ratio"] for value in row]
    assert sum(math.isinf(value) for value in ratios) == 1
    by_bin = record["response"]["positions"]["ratio"]
    assert by_bin[1][0] == math.inf and all(math.isfinite(row[0]) for at, row in enumerate(by_bin) if at != 1)


# ---- rules -----------------------------------------------------------------------------------------------------


def test_placeholders_in_a_response_are_refused(family_checkpoint):
    checkpoint = family_checkpoint("qwen2_5_vl")
    placeholder = checkpoint.role_map.image_token_ids[0]
    bad = Conversation(conversation(1).prompt, None, [5, placeholder], False, {})
    with pytest.raises(ValueError, match=rf"image placeholders.*\[{placeholder}\]"):
        Scorer(checkpoint).prepare([bad])


def test_layers_with_a_window_are_refused_with_the_others_named(family_checkpoint):
    checkpoint = family_checkpoint("gemma3")
    with pytest.raises(ValueError, match=r"a sliding window of 64 tokens in layers \[0\]. Select some of \[1\]"):
        Scorer(checkpoint, layers=(0, 1))
    assert Scorer(checkpoint).layers == (1,)
    assert Scorer(checkpoint, layers=(-1,)).layers == (1,)


def test_layers_that_do_not_exist_are_refused(family_checkpoint):
    with pytest.raises(ValueError, match="layers must be distinct indices among the 2"):
        Scorer(family_checkpoint("qwen2_vl"), layers=(2,))


def test_cross_attention_has_no_vas(family_checkpoint):
    checkpoint = family_checkpoint("mllama")
    with pytest.raises(ValueError, match="one softmax; got model_type='mllama'.*no VAS of this family"):
        Scorer(checkpoint)
    with pytest.raises(ValueError, match="one softmax"):
        measurable_layers(checkpoint.family, checkpoint.model.config, (0,))


def test_cross_attention_generates_one_at_a_time(family_checkpoint):
    """Alone its greedy answer is what teacher forcing predicts; a left-padded batch is refused."""
    checkpoint = family_checkpoint("mllama")
    prompt = render(checkpoint.processor, conversation(1, answered=False).prompt, add_generation_prompt=True)
    [ids] = generate_ids(checkpoint, [prompt], 4)
    answered = replace(prompt, ids_S=torch.cat([prompt.ids_S, torch.tensor(ids)]))
    with torch.no_grad():
        logits_SV = checkpoint.model(**checkpoint.collate([answered]), use_cache=False).logits[0]
    assert logits_SV[len(prompt.ids_S) - 1 : -1].argmax(-1).tolist() == ids
    with pytest.raises(ValueError, match="got a batch of 2. Use batch_size=1"):
        generate_ids(checkpoint, [prompt, prompt], 4)


def test_images_whose_tokens_do_not_add_up_are_refused(family_checkpoint, monkeypatch):
    from avar_verl.tools.vas import score

    checkpoint = family_checkpoint("llava_next")
    scorer = Scorer(checkpoint)
    render_one = score.render

    def loses_a_token(processor, messages, **kwargs):
        rendered = render_one(processor, messages, **kwargs)
        alone = len(messages) == 1
        return score.replace(rendered, ids_S=rendered.ids_S[:0]) if alone else rendered

    monkeypatch.setattr(score, "render", loses_a_token)
    with pytest.raises(ValueError, match=r"image tokens of a sample must be those of its images; got \d+ tokens for 2"):
        scorer.prepare([conversation(2)])


def test_bins_are_two_an_octave():
    assert BIN_STARTS[:10] == (0, 4, 8, 12, 16, 24, 32, 48, 64, 96) and BIN_STARTS[-1] == 196608
    assert list(BIN_STARTS) == sorted(set(BIN_STARTS))
