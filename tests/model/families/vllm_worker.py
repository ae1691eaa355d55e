# SPDX-License-Identifier: Apache-2.0
"""What vLLM makes of prompts with images, in a process of its own.

Arguments of `python -m tests.model.families.vllm_worker`: the model's folder, the folder of a model of the same shape
whose weights are sent to it afterwards, as verl sends them after a training step, and the file for the answers.
"""

import json
import os
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

from transformers import AutoModelForImageTextToText, AutoProcessor
from verl.workers.engine.fsdp.utils import unfuse_moe_params
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import cpu_fused_moe

from avar_verl.model.render import images_of, render
from avar_verl.plugin.compat.verl.weight_names import checkpoint_name
from tests.model.families.tiny import sample_messages

NEW_TOKENS = 8
# Conversations by their arguments of `sample_messages`.
PROMPTS = (
    {"n_images": 1},
    {"n_images": 2},
    {"n_images": 2, "turns": 2, "seed": 3},
)


def prompts() -> list[list[dict]]:
    """The conversations, with a system turn and without an answer to the last question."""
    return [sample_messages(system=True, answered=False, **arguments) for arguments in PROMPTS]


def generate(llm: LLM, processor) -> list[dict]:
    """For every prompt its expanded ids, the generated ids and their log-probabilities."""
    requests = [
        TokensPrompt(
            prompt_token_ids=render(processor, messages, add_generation_prompt=True).prompt_ids,
            multi_modal_data={"image": images_of(messages)},
        )
        for messages in prompts()
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True)
    answers = []
    for output in llm.generate(requests, sampling, use_tqdm=False):
        completion = output.outputs[0]
        steps = zip(completion.logprobs, completion.token_ids, strict=True)
        answers.append(
            {
                "prompt_ids": list(output.prompt_token_ids),
                "token_ids": list(completion.token_ids),
                "logprobs": [step[token].logprob for step, token in steps],
            }
        )
    return answers


def send_weights(llm: LLM, path: str) -> None:
    """Weights as the engine sends them: experts one by one, under the names of checkpoints."""
    model = AutoModelForImageTextToText.from_pretrained(path)
    name_of = checkpoint_name(model)
    buffers = dict(model.named_buffers())
    weights = ((name, value) for name, value in model.state_dict().items() if name not in buffers)
    unfused = unfuse_moe_params(weights, model.config.model_type)
    llm.apply_model(lambda inner: inner.load_weights((name_of(name), value) for name, value in unfused))
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def main(path: str, other: str, out: str) -> None:
    # In float32 on the CPU experts make their activation anew in every forward pass (cpu_fused_moe.py:53), where it
    # finds no config and raises.
    cpu_fused_moe._CPU_MOE_ACT_FN[cpu_fused_moe.MoEActivation.SILU] = SiluAndMul.forward_native
    processor = AutoProcessor.from_pretrained(path)
    llm = LLM(
        model=path,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=1,
        limit_mm_per_prompt={"image": 2, "video": 0},
        skip_mm_profiling=True,
        seed=0,
    )
    answers = {"loaded": generate(llm, processor)}
    try:
        send_weights(llm, other)
        answers["sent"] = generate(llm, processor)
    except Exception as error:  # The test says so; the answers above are of use.
        answers["error"] = f"{type(error).__name__}: {error}"
    with open(out, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
