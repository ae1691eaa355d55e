# SPDX-License-Identifier: Apache-2.0
"""What vLLM makes of prompts with images, in a process of its own: `python -m ... MODEL LENGTH OUT.json`.

The engine takes the memory of a device and starts processes, so `avar doctor --rollout` runs it as a program.
"""

import json
import os
import sys
from pathlib import Path

from avar_verl.data.messages import images_of
from avar_verl.model.checkpoint import load_processor
from avar_verl.model.render import render
from avar_verl.tools.doctor.samples import conversations

NEW_TOKENS = 8
ROOM = 64  # Positions beyond the longest prompt and its answer.


def prompts() -> list[list[dict]]:
    """The conversations with images, without the answer to the last question."""
    return [messages[:-1] for messages in conversations().values() if images_of(messages)]


def make_request(processor, messages: list[dict]) -> dict:
    """vLLM's prompt: un-expanded ids, and the images."""
    request = {"prompt_token_ids": render(processor, messages, add_generation_prompt=True).prompt_ids}
    images = images_of(messages)
    return {**request, "multi_modal_data": {"image": images}} if images else request


def answer(output, completion) -> dict:
    """One of vLLM's answers to a request, sampled with `logprobs=0`, as JSON."""
    steps = zip(completion.logprobs, completion.token_ids, strict=True)
    return {
        "prompt_ids": list(output.prompt_token_ids),
        "token_ids": list(completion.token_ids),
        "logprobs": [step[token].logprob for step, token in steps],
    }


def main(path: str, length: int, out: Path) -> None:
    """Answer every prompt greedily; write its expanded ids, the new ids and their log-probabilities."""
    from vllm import LLM, SamplingParams

    processor = load_processor(path)
    llm = LLM(
        model=path,
        dtype="float32",
        enforce_eager=True,
        max_model_len=length + ROOM,
        max_num_seqs=1,
        limit_mm_per_prompt={"image": max(len(images_of(messages)) for messages in prompts()), "video": 0},
        skip_mm_profiling=True,
        seed=0,
    )
    requests = [make_request(processor, messages) for messages in prompts()]
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    out.write_text(json.dumps([answer(output, output.outputs[0]) for output in outputs]))


if __name__ == "__main__":
    # Where there is no GPU: little memory, no pinned cores. vLLM on a GPU does not read these.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
