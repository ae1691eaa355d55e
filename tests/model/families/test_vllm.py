# SPDX-License-Identifier: Apache-2.0
"""vLLM and transformers see the same prompt and the same model: un-expanded ids expand to those of `render`, and the
generated tokens have the same log-probabilities, before and after new weights are sent.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import collate, render
from tests.model.families.tiny import build_tiny

pytest.importorskip("vllm")
from tests.model.families.vllm_worker import NEW_TOKENS, prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
REPOSITORY = Path(__file__).parents[3]
# vLLM has had no Llama 3.2 Vision since 0.10.2.
ROLLOUTS = [name for name in FAMILIES if name != "mllama"]


@pytest.fixture(scope="module")
def other_path(tmp_path_factory):
    """`other_path(model_type)` -> a tiny model with other weights."""
    folder = tmp_path_factory.mktemp("others")
    return functools.cache(lambda model_type: build_tiny(model_type, folder / model_type, seed=1))


@pytest.fixture(scope="module", params=ROLLOUTS)
def answered(request, family_path, other_path, tmp_path_factory):
    """A model type and what vLLM answered for it (`tests.model.families.vllm_worker`)."""
    model_type = request.param
    out = tmp_path_factory.mktemp("vllm") / "answers.json"
    worker = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.model.families.vllm_worker",
            family_path(model_type),
            other_path(model_type),
            out,
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=350,
    )
    assert worker.returncode == 0, (worker.stdout + worker.stderr)[-5000:]
    return model_type, json.loads(out.read_text())


def teacher_forced(model, rendered, token_ids) -> torch.Tensor:
    """(T,) log-probabilities of the tokens behind the prompt."""
    ids_S = torch.cat([rendered.ids_S, torch.tensor(token_ids)])
    family = get_family(model.config.model_type)
    inputs = collate(family, model.config, [dataclasses.replace(rendered, ids_S=ids_S)], pad_id=0)
    if "token_type_ids" in inputs:
        # vLLM's attention on the CPU is causal between the tokens of an image too (no `supports_mm_prefix` in
        # vllm/v1/attention/backends/cpu_attn.py), where Gemma 3 and vLLM on a GPU let them see each other.
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    with torch.no_grad():
        logits_SV = model(**inputs).logits[0]
    predicted_TV = logits_SV[-len(token_ids) - 1 : -1].log_softmax(-1)
    return predicted_TV.gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def check(model, processor, answers) -> None:
    for messages, answer in zip(prompts(), answers, strict=True):
        rendered = render(processor, messages, add_generation_prompt=True)
        assert answer["prompt_ids"] == rendered.ids_S.tolist()
        assert len(answer["token_ids"]) == NEW_TOKENS
        expected_T = teacher_forced(model, rendered, answer["token_ids"])
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected_T, atol=1e-3, rtol=0)


def test_vllm_expands_the_prompt_alike_and_gives_the_same_logprobs(answered, family_processor, family_model):
    model_type, answers = answered
    check(family_model(model_type), family_processor(model_type), answers["loaded"])


def test_vllm_takes_the_weights_that_verl_sends(answered, family_processor, other_path):
    model_type, answers = answered
    assert "error" not in answers, answers["error"]
    model = AutoModelForImageTextToText.from_pretrained(other_path(model_type)).eval()
    check(model, family_processor(model_type), answers["sent"])
