# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM runs this model, with the same prompts as training.

Shape suffixes: T = generated tokens, S = positions, V = vocabulary.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from avar_verl.model.render import Rendered
from avar_verl.plugin.compat.cpu import detect
from avar_verl.plugin.compat.cpu import vllm as vllm_cpu
from avar_verl.tools.doctor.check import Finding, Skip, check
from avar_verl.tools.doctor.subject import Subject
from avar_verl.tools.doctor.vllm_worker import NEW_TOKENS, prompts

LOGPROB_TOLERANCE = 1e-3
TIMEOUT_S = 1800


@check(
    "architecture",
    prevents="vLLM refuses unknown architectures, but only when the rollout servers start.",
    fix="Install the vLLM version that this plugin is made for, or run only the cold start.",
    needs=["family"],
)
def architecture(subject: Subject) -> str:
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vllm is not installed")
    if detect.is_active():
        vllm_cpu.alias_distribution()
    from vllm import ModelRegistry, __version__

    names = subject.config.architectures or []
    known = set(ModelRegistry.get_supported_archs())
    if not names or names[0] not in known:
        raise ValueError(
            f"config.architectures[0] must be one of the {len(known)} that vLLM {__version__} knows; got {names}."
        )
    return f"vLLM {__version__} knows {names[0]}"


def causal_images(subject: Subject) -> bool:
    """Whether vLLM is causal between the tokens of one image although the model lets them see each other (Gemma 3).

    This is so on the CPU (no `supports_mm_prefix` in vllm/v1/attention/backends/cpu_attn.py).
    """
    return detect.is_active() and "token_type_ids" in subject.inputs([subject.samples["one image"]])


def teacher_forced(subject: Subject, prompt: Rendered, token_ids: list[int]) -> torch.Tensor:
    """(T,) log-probabilities of tokens after a rendered prompt, by transformers."""
    whole_S = torch.cat([prompt.ids_S, torch.tensor(token_ids)])
    inputs = subject.inputs([dataclasses.replace(prompt, ids_S=whole_S)])
    if causal_images(subject):
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    logits_SV = subject.model(**inputs, use_cache=False).logits[0].float().cpu()
    logprobs_TV = logits_SV[-len(token_ids) - 1 : -1].log_softmax(-1)
    return logprobs_TV.gather(1, torch.tensor(token_ids)[:, None])[:, 0]


@check(
    "rollout",
    prevents="If vLLM expands images into different tokens, or computes a different model, its rollouts do not match "
    "training.",
    fix="Install the vLLM and transformers versions that this plugin is made for (pyproject.toml), with the same "
    "processor settings.",
    needs=["architecture", "images"],
)
@torch.no_grad()
def rollout(subject: Subject) -> Finding | str:
    if not subject.options.rollout:
        raise Skip("no --rollout")
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vllm is not installed")
    subject.large = sys.maxsize  # This check is about the checkpoint itself, whatever its size.
    rendered = [subject.render(messages, add_generation_prompt=True) for messages in prompts()]
    subject.forget_model()  # vLLM needs the memory.
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answers.json"
        length = max(len(prompt.ids_S) for prompt in rendered) + NEW_TOKENS
        command = [
            sys.executable,
            "-m",
            "avar_verl.tools.doctor.vllm_worker",
            subject.options.model,
            str(length),
            str(out),
        ]
        worker = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if worker.returncode or not out.exists():
            raise RuntimeError(
                f"vLLM must start and answer; got exit code {worker.returncode}: {worker.stderr[-2000:]}"
            )
        answers = json.loads(out.read_text())
    worst = 0.0
    for number, (prompt, answer) in enumerate(zip(rendered, answers, strict=True)):
        if answer["prompt_ids"] != prompt.ids_S.tolist():
            raise ValueError(
                f"vLLM must expand a prompt to the ids of training; got {len(answer['prompt_ids'])} ids for "
                f"{len(prompt.ids_S)} in prompt {number}."
            )
        expected_T = teacher_forced(subject, prompt, answer["token_ids"])
        worst = max(worst, float((torch.tensor(answer["logprobs"]) - expected_T).abs().max()))
        if not worst <= LOGPROB_TOLERANCE:
            raise ValueError(
                f"greedy log-probabilities must be those of transformers; got a difference of {worst:.1e} in prompt "
                f"{number}."
            )
    detail = f"{len(answers)} prompts have the same ids, {NEW_TOKENS} greedy tokens: max |difference| {worst:.0e} nats"
    if causal_images(subject):
        return Finding(
            detail,
            "vLLM on the CPU is causal between the tokens of an image, but this model is not: its rollouts come from "
            "a slightly different model, and were compared with that one. On a GPU, vLLM does what the model does.",
        )
    return detail
