# SPDX-License-Identifier: Apache-2.0
"""The intervention in vLLM: the same log-probabilities as in transformers, whatever else is in the engine."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avar_verl.intervention.spec import InterventionSpec
from avar_verl.intervention.transformers_hook import intervene
from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import collate, render
from avar_verl.roles import RoleMap
from tests.intervention import vllm_worker as worker

pytest.importorskip("vllm")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
# The first model is also asked in an engine that was not started for the intervention.
MODELS = ("qwen2_5_vl", "qwen3_vl")
each_model = pytest.mark.parametrize("model_type", MODELS)


def ask(paths: list[Path], folder: Path, engine: dict, **environment: str) -> list[dict]:
    """What vLLM has answered, by model (`tests.intervention.vllm_worker`)."""
    out = folder / "answers.json"
    command = [sys.executable, "-m", "tests.intervention.vllm_worker", out, json.dumps(engine), *map(str, paths)]
    run = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=800, env=os.environ | environment
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
    return list(json.loads(out.read_text()).values())


@pytest.fixture(scope="module")
def answers(family_path, tmp_path_factory):
    """By model type."""
    folder, paths = tmp_path_factory.mktemp("vllm"), [family_path(model_type) for model_type in MODELS]
    # An eager engine compiles nothing, and to find out what a compiler could do takes vLLM longer than all the rest.
    answered = ask(paths, folder, {"enforce_eager": True}, TORCHDYNAMO_DISABLE="1")
    return dict(zip(MODELS, answered, strict=True))


@pytest.fixture(scope="module")
def check(family_model, family_processor):
    """`check(model_type, (prompt, setting), answer)`: transformers gives these tokens the same log-probabilities."""
    conversations = worker.prompts()

    def run(model_type: str, request: tuple[int, str | None], answer: dict) -> None:
        model, processor = family_model(model_type), family_processor(model_type)
        prompt = render(processor, conversations[request[0]], add_generation_prompt=True)
        assert answer["prompt_ids"] == prompt.ids_S.tolist()
        new_ids = torch.tensor(answer["token_ids"])
        ids_S = torch.cat([prompt.ids_S, new_ids])
        family = get_family(model_type)
        inputs = collate(family, model.config, [dataclasses.replace(prompt, ids_S=ids_S)], pad_id=0)
        if "token_type_ids" in inputs:  # As in tests/model/families/test_vllm.py.
            inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
        roles = RoleMap.from_pretrained(processor, model.config)(
            prompt.ids_S[None], torch.ones_like(prompt.ids_S)[None]
        )

        def logprobs(spec) -> torch.Tensor:
            with torch.no_grad(), intervene(model, roles, spec):
                logits_SV = model(**inputs, use_cache=False).logits[0]
            return logits_SV[-len(new_ids) - 1 : -1].log_softmax(-1).gather(1, new_ids[:, None])[:, 0]

        spec = InterventionSpec.of(request[1])
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), logprobs(spec), atol=1e-3, rtol=0)
        if not spec.is_identity:
            assert float((logprobs(spec) - logprobs(None)).abs().max()) > 2e-2, "the test cannot fail"

    return run


def check_all(check, model_type, requests, answers) -> None:
    assert len(answers) == len(requests)
    for request, answer in zip(requests, answers, strict=True):
        check(model_type, request, answer)


@each_model
def test_a_batch_of_prompts_and_settings(model_type, answers, check):
    """Chunks of a prompt that is longer than a step, one with its images cut."""
    batch = answers[model_type]["intervened"]["batch"]
    assert max(len(answer["prompt_ids"]) for answer in batch) > 2 * worker.MAX_BATCHED_TOKENS
    check_all(check, model_type, worker.BATCH, batch)


def test_nothing_asked_is_the_stock_engine_to_the_bit(answers):
    """Nothing, or an alpha of zero. Beside other requests vLLM itself rounds otherwise."""
    stock, intervened = answers[MODELS[0]]["stock"], answers[MODELS[0]]["intervened"]
    assert stock["plain"] == intervened["plain"] == intervened["nothing"]
    for (index, spec), answer in zip(worker.BATCH, intervened["batch"], strict=True):
        if InterventionSpec.of(spec).is_identity:
            assert answer["logprobs"] == pytest.approx(stock["plain"][index]["logprobs"], abs=1e-5)


def test_an_alpha_of_zero_may_be_asked_of_any_engine(answers):
    """And shares the blocks of those that ask for nothing."""
    stock = answers[MODELS[0]]["stock"]
    assert stock["nothing"][0]["logprobs"] == pytest.approx(stock["plain"][0]["logprobs"], abs=1e-5)
    assert stock["nothing"][0]["num_cached"] == 2 * worker.BLOCK_SIZE


def test_the_default_of_an_engine(answers, check):
    """Requests that ask for nothing get it, those that ask for something do not."""
    given = [(index, worker.PART if spec is None else spec) for index, spec in worker.DEFAULT]
    check_all(check, MODELS[0], given, answers[MODELS[0]]["default"]["answers"])


@each_model
def test_settings_do_not_share_blocks_of_the_prefix_cache(model_type, answers, check):
    again = answers[model_type]["intervened"]["again"]
    if model_type == MODELS[0]:  # Qwen3-VL has fewer tokens for an image.
        assert [answer["num_cached"] for answer in again] == [cached for _, cached in worker.AGAIN]
    assert [answer["num_cached"] > 0 for answer in again] == [cached > 0 for _, cached in worker.AGAIN]
    check_all(check, model_type, [(0, spec) for spec, _ in worker.AGAIN], again)


@each_model
def test_several_answers_to_a_prompt(model_type, answers, check):
    several = answers[model_type]["intervened"]["several"]
    assert len({tuple(answer["token_ids"]) for answer in several}) == 3
    check_all(check, model_type, [(1, worker.BOTH)] * 3, several)


@each_model
def test_preempted_requests(model_type, answers, check):
    """Their prompt is computed anew with the tokens that had followed it, which are not scaled."""
    intervened = answers[model_type]["intervened"]
    longest = max(len(answer["prompt_ids"]) for answer in intervened["crowd"])
    if model_type == MODELS[0]:
        assert max(intervened["preempted"]) > longest
    check_all(check, model_type, worker.CROWD, intervened["crowd"])


def test_what_cannot_be_done_is_refused_where_it_is_asked(answers):
    for (_, expected), message in zip(worker.REFUSED, answers[MODELS[0]]["intervened"]["refused"], strict=True):
        assert expected in message
    assert "needs an engine that was started for it" in answers[MODELS[0]]["stock"]["refused"]


OTHERS = sorted(set(FAMILIES) - {*MODELS} - {name for name in FAMILIES if get_family(name).cross_attention})


def check_engine(check, model_type, answers) -> None:
    """Everything that an engine was asked."""
    intervened = answers["intervened"]
    check_all(check, model_type, worker.BATCH, intervened["batch"])
    check_all(check, model_type, [(1, worker.BOTH)] * 3, intervened["several"])
    check_all(check, model_type, [(0, spec) for spec, _ in worker.AGAIN], intervened["again"])
    check_all(check, model_type, worker.CROWD, intervened["crowd"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS)
def test_every_other_family(model_type, family_path, tmp_path, check):
    (answered,) = ask([family_path(model_type)], tmp_path, {"enforce_eager": True}, TORCHDYNAMO_DISABLE="1")
    check_engine(check, model_type, answered)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [{}, {"enforce_eager": True, "tensor_parallel_size": 2}], ids=["compiled", "two ranks"]
)
def test_engines_in_processes_of_their_own(engine, family_path, tmp_path, check):
    """The plugin reaches every process; compiled graphs; two ranks with one key/value head each."""
    paths = [family_path("qwen2_5_vl")]
    (answered,) = ask(paths, tmp_path, engine, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    check_engine(check, "qwen2_5_vl", answered)
    assert answered["stock"]["plain"] == answered["intervened"]["plain"]
