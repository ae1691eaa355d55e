# SPDX-License-Identifier: Apache-2.0
"""What vLLM answers under interventions: `python -m tests.intervention.vllm_worker OUT ENGINE MODEL...`.

Engines one after the other, with chunked prefill (fewer tokens a step than a prompt has) and prefix caching: for every
model one that was started for the intervention, and for the first model one that was not, and one with a setting of its
own for requests that ask for nothing. ENGINE is JSON, arguments of `vllm.LLM` beside those in `start`.

vLLM's start runs this module a second time, in a process that reads CPU flags, so what takes long to import is imported
in functions.
"""

import gc
import json
import os
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

NEW_TOKENS = 6
MAX_BATCHED_TOKENS = 48
BLOCK_SIZE = 16
BOTH = "alpha_img=0.35,alpha_sys=0.6"
PART = "alpha_img=-0.5,alpha_sys=-0.4,layers=1,heads=2-3"
NOTHING = "alpha_img=0,layers=0"
# (prompt, setting) of requests that are in the engine at the same time; None asks for nothing.
BATCH = ((0, None), (0, BOTH), (1, PART), (0, PART), (1, BOTH), (2, "alpha_sys=0.6"), (1, None), (0, NOTHING))
# In an engine whose default is PART.
DEFAULT = ((0, None), (0, NOTHING), (1, BOTH))
PLAIN = ((0, None), (1, None), (2, None))
# The same prompt again and again: a setting finds the blocks of its own alone, here how many tokens of them.
AGAIN = ((None, 0), (BOTH, 0), (BOTH, 32), ("alpha_img=0.36,alpha_sys=0.6", 0), (None, 32), (NOTHING, 32), (BOTH, 32))
# More than the cache has blocks for, so that some are preempted and computed anew, with what they had answered.
CROWD = ((1, BOTH), (1, PART), (1, None), (1, "alpha_sys=0.6"))
CROWD_TOKENS = 32
NUM_BLOCKS = 26
REFUSED = (
    ("alpha_img=x", "must be a number"),
    ("alpha_img=1,layers=40", "layers must be among"),
    ("alpha_img=1,heads=0", "must be chosen together"),
)


def prompts() -> list[list[dict]]:
    """Conversations with one image, with two, and without; the last question is not answered."""
    from tests.model.families.tiny import sample_messages

    return [
        sample_messages(1, system=True, answered=False),
        sample_messages(2, system=True, turns=2, seed=3, answered=False),
        sample_messages(0, system=True, seed=5, answered=False),
    ]


def generate(llm, processor, requests, n: int = 1, max_tokens: int = NEW_TOKENS) -> list[dict]:
    """For every request its expanded ids, how many of them were cached, generated ids and their log-probabilities."""
    from vllm import SamplingParams, TokensPrompt

    from avar_verl.intervention.vllm_hook import request_arguments
    from avar_verl.model.render import images_of, render
    from avar_verl.roles import RoleMap

    conversations = prompts()
    # A random model would write placeholders, to which there is no image.
    placeholders = RoleMap.from_pretrained(processor, llm.model_config.hf_config).image_token_ids
    texts, params = [], []
    for index, spec in requests:
        messages = conversations[index]
        prompt = {"prompt_token_ids": render(processor, messages, add_generation_prompt=True).prompt_ids}
        if images := images_of(messages):
            prompt["multi_modal_data"] = {"image": images}
        texts.append(TokensPrompt(**prompt))
        params.append(
            SamplingParams(
                n=n,
                temperature=0.0 if n == 1 else 1.0,
                seed=0,
                max_tokens=max_tokens,
                logprobs=0,
                ignore_eos=True,
                logit_bias=dict.fromkeys(placeholders, -100.0),
                extra_args=request_arguments(spec),
            )
        )
    answers = []
    for output in llm.generate(texts, params, use_tqdm=False):
        for completion in output.outputs:
            steps = zip(completion.logprobs, completion.token_ids, strict=True)
            answers.append(
                {
                    "prompt_ids": list(output.prompt_token_ids),
                    "num_cached": output.num_cached_tokens,
                    "token_ids": list(completion.token_ids),
                    "logprobs": [step[token].logprob for step, token in steps],
                }
            )
    return answers


def start(path: str, **arguments):
    from vllm import LLM

    return LLM(
        model=path,
        dtype="float32",
        max_model_len=160,
        num_gpu_blocks_override=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=4,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        enable_prefix_caching=True,
        limit_mm_per_prompt={"image": 2, "video": 0},
        skip_mm_profiling=True,
        seed=0,
        **arguments,
    )


def refusal(llm, processor, spec: str) -> str:
    try:
        generate(llm, processor, [(0, spec)])
    except ValueError as error:
        return str(error)
    return "none"


def count_preemptions(llm, counts: list) -> None:
    """Append how many tokens each preempted request had computed; where the engine is in this process."""
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1":
        return
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    original = scheduler._preempt_request

    def preempt(request, *args, **kwargs):
        counts.append(request.num_computed_tokens)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt


def stock(llm, processor) -> dict:
    return {
        "plain": generate(llm, processor, PLAIN),
        "refused": refusal(llm, processor, BOTH),
        "nothing": generate(llm, processor, [(0, NOTHING)]),
    }


def with_default(llm, processor) -> dict:
    return {"answers": generate(llm, processor, DEFAULT)}


def intervened(llm, processor) -> dict:
    answers = {
        "batch": generate(llm, processor, BATCH),
        "refused": [refusal(llm, processor, spec) for spec, _ in REFUSED],
        "several": generate(llm, processor, [(1, BOTH)], n=3),
        "preempted": [],
    }
    llm.reset_prefix_cache()
    answers["again"] = [generate(llm, processor, [(0, spec)])[0] for spec, _ in AGAIN]
    llm.reset_prefix_cache()
    answers["plain"] = generate(llm, processor, PLAIN)
    llm.reset_prefix_cache()
    answers["nothing"] = generate(llm, processor, [(index, NOTHING) for index, _ in PLAIN])
    count_preemptions(llm, answers["preempted"])
    answers["crowd"] = generate(llm, processor, CROWD, max_tokens=CROWD_TOKENS)
    return answers


def main(out: str, engine: str, *paths: str) -> None:
    from transformers import AutoProcessor
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    from avar_verl.intervention.vllm_hook import engine_arguments

    # As in tests/model/families/vllm_worker.py.
    cpu_fused_moe._CPU_MOE_ACT_FN[cpu_fused_moe.MoEActivation.SILU] = SiluAndMul.forward_native
    answers = {}
    for path in paths:
        processor = AutoProcessor.from_pretrained(path)
        parts = {"intervened": (intervened, engine_arguments())}
        if not answers:
            parts |= {"stock": (stock, {}), "default": (with_default, engine_arguments(PART))}
        answers[path] = {}
        for name, (ask, arguments) in parts.items():
            llm = start(path, **json.loads(engine), **arguments)
            answers[path][name] = ask(llm, processor)
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()
    with open(out, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
