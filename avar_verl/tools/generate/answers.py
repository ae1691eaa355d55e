# SPDX-License-Identifier: Apache-2.0
"""Greedy answers to prompts under an intervention, from transformers or from vLLM in this process.

Both get the same ids (`avar_verl.model.render`), stop at the same tokens and, with the same dtype, give the same
answers except where rounding decides ties.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from avar_verl.data.messages import images_of
from avar_verl.intervention.spec import InterventionSpec
from avar_verl.intervention.transformers_hook import generate
from avar_verl.model.checkpoint import Checkpoint, load_config, load_model, load_processor
from avar_verl.model.render import Rendered, render
from avar_verl.model.roles import RoleMap, TokenRole
from avar_verl.plugin.datasets.images import patch_size_of
from avar_verl.tools.generate.command import ModelCommand
from avar_verl.tools.options import default_device
from avar_verl.tools.questions import Reply


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model gets it, and the numbers of its tokens whose keys can be scaled."""

    rendered: Rendered
    images: list[Image.Image]
    image_keys: int
    system_keys: int


class PromptReader:
    """Renders conversations for one model.

    Raises:
        ValueError: a model of an unknown family.
    """

    def __init__(self, path: str | Path):
        self.config, self.processor = load_config(path), load_processor(path)
        self.role_map = RoleMap.from_pretrained(self.processor, self.config)

    @property
    def patch_size(self) -> int:
        return patch_size_of(self.processor)

    def __call__(self, messages: Sequence[dict], template_kwargs: dict[str, Any] | None = None) -> Prompt:
        """The prompt of a conversation with images in its blocks, up to the assistant's answer."""
        rendered = render(self.processor, messages, add_generation_prompt=True, template_kwargs=template_kwargs)
        ids_1S = rendered.ids_S[None]
        roles_1S = self.role_map(ids_1S, torch.ones_like(ids_1S))
        counts = [int((roles_1S == role).sum()) for role in (TokenRole.IMAGE, TokenRole.SYSTEM)]
        return Prompt(rendered, images_of(messages), *counts)

    def reply(self, prompt: Prompt, ids: Sequence[int], finish_reason: str, start: float) -> Reply:
        """The reply of generated ids, including the one that ended it, to a batch that was asked at `start`."""
        text = self.processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        seconds = time.monotonic() - start
        return Reply(text, finish_reason, len(prompt.rendered.ids_S), len(ids), seconds=seconds)


class TransformersBackend:
    """Answers from transformers, `batch_size` prompts at a time."""

    def __init__(self, options: ModelCommand, reader: PromptReader, device: str, dtype: str):
        self.reader, self.options = reader, options
        model = load_model(options.model, device, dtype, attn_implementation="sdpa")
        self.checkpoint = Checkpoint(model, reader.processor, reader.role_map)

    @torch.no_grad()
    def answers(self, prompts: Sequence[Prompt], spec: InterventionSpec) -> list[Reply]:
        """Answers of one batch, in order."""
        start = time.monotonic()
        inputs = self.checkpoint.prompts([prompt.rendered for prompt in prompts])
        ids_BS = generate(
            self.checkpoint.model,
            self.checkpoint.role_map,
            spec,
            inputs,
            max_new_tokens=self.options.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # Some checkpoints set one, which vLLM ignores.
        )
        responses = self.checkpoint.responses(ids_BS, inputs["input_ids"].shape[1])
        return [self.reader.reply(prompt, *one, start) for prompt, one in zip(prompts, responses, strict=True)]


class VllmBackend:
    """Answers from a vLLM engine in this process, `batch_size` prompts at a time."""

    def __init__(self, options: ModelCommand, reader: PromptReader, device: str, dtype: str):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        cpu = device == "cpu"
        if cpu:  # Little memory, no pinned cores.
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM

        from avar_verl.intervention.vllm_hook import engine_arguments

        self.reader, self.options = reader, options
        self.llm = LLM(
            model=options.model,
            dtype=dtype,
            enforce_eager=cpu,
            skip_mm_profiling=cpu,
            max_model_len=options.max_model_len,
            max_num_seqs=options.batch_size,
            seed=0,
            **engine_arguments(),
        )

    def answers(self, prompts: Sequence[Prompt], spec: InterventionSpec) -> list[Reply]:
        """Answers of one batch, in order."""
        from vllm import SamplingParams, TokensPrompt

        from avar_verl.intervention.vllm_hook import request_arguments

        sampling = SamplingParams(
            temperature=0.0, max_tokens=self.options.max_new_tokens, extra_args=request_arguments(spec) or None
        )
        requests = [
            TokensPrompt(
                prompt_token_ids=prompt.rendered.prompt_ids,
                **({"multi_modal_data": {"image": prompt.images}} if prompt.images else {}),
            )
            for prompt in prompts
        ]
        start = time.monotonic()
        outputs = [output.outputs[0] for output in self.llm.generate(requests, sampling, use_tqdm=False)]
        # vLLM's own text omits bytes that one more token could complete to a character.
        return [
            self.reader.reply(prompt, output.token_ids, output.finish_reason, start)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]


Backend = TransformersBackend | VllmBackend


def default_dtype(reader: PromptReader, device: str) -> str:
    """float32 without an accelerator, else the checkpoint's."""
    dtype = reader.config.dtype or getattr(reader.config.get_text_config(), "dtype", None)
    return "float32" if device == "cpu" or dtype is None else str(dtype).removeprefix("torch.")


def open_backend(options: ModelCommand, reader: PromptReader) -> Backend:
    """The backend of a command."""
    device = options.device or default_device()
    backend = VllmBackend if options.backend == "vllm" else TransformersBackend
    return backend(options, reader, device, options.dtype or default_dtype(reader, device))


def check_effect(spec: InterventionSpec, image_keys: int, system_keys: int) -> None:
    """Refuse an intervention without any keys to scale.

    Args:
        image_keys, system_keys: numbers in all prompts together.

    Raises:
        ValueError: image keys should be scaled but no prompt has an image, or the same for system turns.
    """
    for name, alpha, count, what in (
        ("alpha_img", spec.alpha_img, image_keys, "an image"),
        ("alpha_sys", spec.alpha_sys, system_keys, "a system turn"),
    ):
        if alpha != 0 and count == 0:
            raise ValueError(
                f"{name} needs a prompt with {what}; got {name}={alpha} and none. Set it to 0, or add one."
            )
