# SPDX-License-Identifier: Apache-2.0
"""vLLM and transformers: the same prompts, the same model, the same interventions. Its answers are those of
tests/vllm_worker.py, many engines in one process.
"""

import dataclasses
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from avar_verl.intervention.spec import InterventionSpec
from avar_verl.intervention.transformers_hook import intervene
from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import collate, render
from avar_verl.roles import RoleMap
from tests import vllm_worker as worker
from tests.e2e.family_data import BFLOAT16_ROLLOUTS, GPU_ROLLOUTS, UNSCALED_ROLLOUTS
from tests.model.families.tiny import build_tiny

pytest.importorskip("vllm")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
MODELS = "qwen2_5_vl", "qwen3_vl"
FIRST = MODELS[0]
each_model = pytest.mark.parametrize("model_type", MODELS)


@pytest.fixture(scope="module")
def answers(family_path, tmp_path_factory):
    """By model type and question; the first model is also asked without interventions and with a default."""
    first, second = ({"model": family_path(name), "engine": worker.EAGER} for name in MODELS)
    jobs = [
        {**first, "ask": ["intervened"], "intervene": None},
        {**first, "ask": ["stock"]},
        {**first, "ask": ["default"], "intervene": worker.PART},
        {**second, "ask": ["intervened"], "intervene": None},
    ]
    answered = worker.run(jobs, tmp_path_factory.mktemp("vllm"), **worker.NO_COMPILER)
    for one in answered:
        assert "error" not in one, one["error"]
    return {FIRST: answered[0] | answered[1] | answered[2], MODELS[1]: answered[3]}


def logprobs(model, roles, spec, inputs: dict, new_T: torch.Tensor) -> torch.Tensor:
    """(T,) log-probabilities of the last tokens, by transformers."""
    with torch.no_grad(), intervene(model, roles, spec):
        logits_SV = model(**inputs, use_cache=False).logits[0]
    return logits_SV[-len(new_T) - 1 : -1].log_softmax(-1).gather(1, new_T[:, None])[:, 0]


def compare(model, processor, requests, answers: list[dict]) -> None:
    """Prompts were expanded as `render` does, and transformers gives the answers the same log-probabilities."""
    conversations = worker.prompts()
    for (index, spec), answer in zip(requests, answers, strict=True):
        prompt = render(processor, conversations[index], add_generation_prompt=True)
        assert answer["prompt_ids"] == prompt.ids_S.tolist()
        new_T = torch.tensor(answer["token_ids"])
        whole = dataclasses.replace(prompt, ids_S=torch.cat([prompt.ids_S, new_T]))
        inputs = collate(get_family(model.config.model_type), model.config, [whole], pad_id=0)
        causal = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}.get(model.config.model_type)
        if causal is not None:
            # vLLM's attention on the CPU is causal between the tokens of an image too (no `supports_mm_prefix` in
            # vllm/v1/attention/backends/cpu_attn.py), where Gemma and vLLM on a GPU let them see each other.
            inputs[causal] = torch.zeros_like(inputs[causal])
        ids_1S = prompt.ids_S[None]
        roles = RoleMap.from_pretrained(processor, model.config)(ids_1S, torch.ones_like(ids_1S))
        expected_T = logprobs(model, roles, spec, inputs, new_T)
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected_T, atol=1e-3, rtol=0)
        if not InterventionSpec.of(spec).is_identity:
            plain_T = logprobs(model, roles, None, inputs, new_T)
            assert float((expected_T - plain_T).abs().max()) > 2e-2, "the test cannot fail"


@pytest.fixture(scope="module")
def check(family_model, family_processor):
    """`check(model_type, requests, answers)`: `compare` for a tiny model."""
    return lambda name, requests, answers: compare(family_model(name), family_processor(name), requests, answers)


@each_model
def test_a_batch_of_prompts_and_settings(model_type, answers, check):
    """Chunks of a prompt that is longer than a step, one with its images cut."""
    batch = answers[model_type]["intervened"]["batch"]
    assert max(len(answer["prompt_ids"]) for answer in batch) > 2 * worker.MAX_BATCHED_TOKENS
    check(model_type, worker.BATCH, batch)


def test_nothing_asked_is_the_stock_engine_to_the_bit(answers):
    """Nothing, or an alpha of zero. Beside other requests vLLM itself rounds otherwise."""
    stock, intervened = answers[FIRST]["stock"], answers[FIRST]["intervened"]
    assert stock["plain"] == intervened["plain"] == intervened["nothing"]
    for (index, spec), answer in zip(worker.BATCH, intervened["batch"], strict=True):
        if InterventionSpec.of(spec).is_identity:
            assert answer["logprobs"] == pytest.approx(stock["plain"][index]["logprobs"], abs=1e-5)


def test_an_alpha_of_zero_may_be_asked_of_any_engine(answers):
    """And shares the blocks of those that ask for nothing."""
    stock = answers[FIRST]["stock"]
    assert stock["nothing"][0]["logprobs"] == pytest.approx(stock["plain"][0]["logprobs"], abs=1e-5)
    assert stock["nothing"][0]["num_cached"] == 2 * worker.BLOCK_SIZE


def test_the_default_of_an_engine(answers, check):
    """Requests that ask for nothing get it, those that ask for something do not."""
    given = [(index, worker.PART if spec is None else spec) for index, spec in worker.DEFAULT]
    check(FIRST, given, answers[FIRST]["default"])


@each_model
def test_settings_do_not_share_blocks_of_the_prefix_cache(model_type, answers, check):
    again = answers[model_type]["intervened"]["again"]
    if model_type == FIRST:  # Qwen3-VL has fewer tokens for an image.
        assert [answer["num_cached"] for answer in again] == [cached for _, cached in worker.AGAIN]
    assert [answer["num_cached"] > 0 for answer in again] == [cached > 0 for _, cached in worker.AGAIN]
    check(model_type, [(0, spec) for spec, _ in worker.AGAIN], again)


@each_model
def test_several_answers_to_a_prompt(model_type, answers, check):
    several = answers[model_type]["intervened"]["several"]
    assert len({tuple(answer["token_ids"]) for answer in several}) == 3
    check(model_type, [(1, worker.BOTH)] * 3, several)


@each_model
def test_preempted_requests(model_type, answers, check):
    """Their prompt is computed anew with the tokens that had followed it, which are not scaled."""
    intervened = answers[model_type]["intervened"]
    longest = max(len(answer["prompt_ids"]) for answer in intervened["crowd"])
    if model_type == FIRST:
        assert max(intervened["preempted"]) > longest
    check(model_type, worker.CROWD, intervened["crowd"])


def test_what_cannot_be_done_is_refused_where_it_is_asked(answers):
    for (_, expected), message in zip(worker.REFUSED, answers[FIRST]["intervened"]["refused"], strict=True):
        assert expected in message
    assert "needs an engine that was started for it" in answers[FIRST]["stock"]["refused"]


# ---- `make slow` -----------------------------------------------------------------------------------------------

# Half of their layers have states instead of keys, which the hook refuses; see below for another reason.
HYBRID = (*BFLOAT16_ROLLOUTS, *GPU_ROLLOUTS)
SHARED_KEYS = ("gemma4",)  # Refused too: late layers read the keys of another one.
NOT_HERE = (*MODELS, *HYBRID, *UNSCALED_ROLLOUTS, *SHARED_KEYS)
OTHERS = [name for name in FAMILIES if name not in NOT_HERE and not get_family(name).cross_attention]


def check_engine(check, model_type, answers) -> None:
    """Everything that an engine was asked."""
    intervened = answers["intervened"]
    check(model_type, worker.BATCH, intervened["batch"])
    check(model_type, [(1, worker.BOTH)] * 3, intervened["several"])
    check(model_type, [(0, spec) for spec, _ in worker.AGAIN], intervened["again"])
    check(model_type, worker.CROWD, intervened["crowd"])


@pytest.fixture(scope="module")
def other_families(family_path, tmp_path_factory):
    asked = {"engine": worker.EAGER, "ask": ["intervened"], "intervene": None}
    jobs = [{"model": family_path(name), **asked} for name in OTHERS]
    answers = worker.run(jobs, tmp_path_factory.mktemp("vllm"), **worker.NO_COMPILER)
    return dict(zip(OTHERS, answers, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS)
def test_every_other_family(model_type, other_families, check):
    assert "error" not in other_families[model_type], other_families[model_type]["error"]
    check_engine(check, model_type, other_families[model_type])


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{}, {**worker.EAGER, "tensor_parallel_size": 2}], ids=["compiled", "two ranks"])
def test_engines_in_processes_of_their_own(engine, family_path, tmp_path, check):
    """The plugin reaches every process; compiled graphs; two ranks with one key/value head each."""
    job = {"model": family_path(FIRST), "engine": engine}
    jobs = [{**job, "ask": ["intervened"], "intervene": None}, {**job, "ask": ["stock"]}]
    answers, stock = worker.run(jobs, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert "error" not in answers | stock, (answers | stock)["error"]
    check_engine(check, FIRST, answers)
    assert stock["stock"]["plain"] == answers["intervened"]["plain"]


# vLLM has had no Llama 3.2 Vision since 0.10.2; in bfloat16 log-probabilities are not equal to 1e-3.
ROLLOUTS = [name for name in FAMILIES if name not in ("mllama", *HYBRID, *UNSCALED_ROLLOUTS)]


@pytest.fixture(scope="module")
def other_path(tmp_path_factory):
    """`other_path(model_type)` -> a tiny model with other weights."""
    folder = tmp_path_factory.mktemp("others")
    return functools.cache(lambda model_type: build_tiny(model_type, folder / model_type, seed=1))


@pytest.fixture(scope="module")
def expanded(family_path, other_path, tmp_path_factory):
    """By model type, before and after its engine was sent the other weights."""
    asked = {"engine": worker.WHOLE_PROMPTS, "ask": ["loaded", "sent"]}
    jobs = [{"model": family_path(name), "other": other_path(name), **asked} for name in ROLLOUTS]
    answered = worker.run(jobs, tmp_path_factory.mktemp("vllm"), **worker.NO_COMPILER)
    return dict(zip(ROLLOUTS, answered, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["loaded", "sent"])
@pytest.mark.parametrize("model_type", ROLLOUTS)
def test_vllm_expands_prompts_alike_and_gives_the_same_logprobs(
    model_type, asked, expanded, family_processor, family_path, other_path
):
    answered = expanded[model_type]
    assert asked in answered, answered["error"]
    path = {"loaded": family_path, "sent": other_path}[asked](model_type)
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    compare(model, family_processor(model_type), worker.PLAIN, answered[asked])


# Weights have the names of checkpoints in memory (the first), or are renamed when they are loaded.
ADAPTED = ["qwen2_5_vl", "gemma3"]


@pytest.fixture(scope="module")
def adapters(other_path, tmp_path_factory):
    """`adapters(model_type)` -> the model of `other_path` with adapters in its language model, and their folder."""
    folder = tmp_path_factory.mktemp("adapters")

    def make(model_type: str):
        family = get_family(model_type)
        torch.manual_seed(0)
        settings = LoraConfig(
            r=4,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            exclude_modules=rf"({'|'.join((*family.towers, *family.projectors))})\..*",
            init_lora_weights=False,
        )
        model = get_peft_model(AutoModelForImageTextToText.from_pretrained(other_path(model_type)).eval(), settings)
        model.save_pretrained(folder / model_type)
        return model, folder / model_type

    return functools.cache(make)


@pytest.fixture(scope="module")
def adapted(family_path, other_path, adapters, tmp_path_factory):
    engine = {**worker.WHOLE_PROMPTS, "enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    jobs = [
        {
            "model": family_path(name),
            "other": other_path(name),
            "adapter": adapters(name)[1],
            "engine": engine,
            "ask": ["adapted"],
        }
        for name in ADAPTED
    ]
    return dict(zip(ADAPTED, worker.run(jobs, tmp_path_factory.mktemp("vllm"), **worker.NO_COMPILER), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ADAPTED)
def test_vllm_applies_the_adapters_that_it_is_sent(model_type, adapted, adapters, other_path, family_processor):
    answered = adapted[model_type]
    assert "adapted" in answered, answered["error"]
    model, _ = adapters(model_type)
    compare(model, family_processor(model_type), worker.PLAIN, answered["adapted"])
    plain = AutoModelForImageTextToText.from_pretrained(other_path(model_type)).eval()
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        compare(plain, family_processor(model_type), worker.PLAIN, answered["adapted"])
