# SPDX-License-Identifier: Apache-2.0
"""What vLLM answers, in a process of its own: `python -m tests.vllm_worker JOBS.json OUT.json`, see `run`.

A job is an engine: `model`, a folder; `engine`, arguments of `vllm.LLM` beside those of ENGINE; `intervene`, if it is
there, starts the engine for interventions and is the setting of requests that ask for nothing; `ask`, functions of this
module by name, each of which gets (llm, processor, job). Engines start one after the other in the same process.

vLLM's start runs this module a second time, in a process that reads CPU flags, so what takes long to import is imported
in functions.
"""

import gc
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

NEW_TOKENS = 6
# Chunked prefill (fewer tokens a step than a prompt has), prefix caching, and a small cache.
MAX_BATCHED_TOKENS = 48
BLOCK_SIZE = 16
ENGINE = {
    "dtype": "float32",
    "max_model_len": 160,
    "num_gpu_blocks_override": 26,
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 4,
    "max_num_batched_tokens": MAX_BATCHED_TOKENS,
    "enable_prefix_caching": True,
    "limit_mm_per_prompt": {"image": 2, "video": 0},
    "skip_mm_profiling": True,
    "seed": 0,
}
# An eager engine compiles nothing, and to find out what a compiler could do takes vLLM longer than all the rest.
EAGER = {"enforce_eager": True}
NO_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}
# For a test about prompts and weights only: whole prompts, one after the other.
WHOLE_PROMPTS = {**EAGER, "max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 1}
WHOLE_PROMPTS["num_gpu_blocks_override"] = None

BOTH = "alpha_img=0.35,alpha_sys=0.6"
PART = "alpha_img=-0.5,alpha_sys=-0.4,layers=1,heads=2-3"
NOTHING = "alpha_img=0,layers=1"
# (prompt, setting) of requests that are in the engine at the same time; None asks for nothing.
BATCH = ((0, None), (0, BOTH), (1, PART), (0, PART), (1, BOTH), (2, "alpha_sys=0.6"), (1, None), (0, NOTHING))
# In an engine whose default is PART.
DEFAULT = ((0, None), (0, NOTHING), (1, BOTH))
PLAIN = ((0, None), (1, None), (2, None))
# The same prompt again and again: a setting finds the blocks of its own only, here how many tokens of them.
AGAIN = ((None, 0), (BOTH, 0), (BOTH, 32), ("alpha_img=0.36,alpha_sys=0.6", 0), (None, 32), (NOTHING, 32), (BOTH, 32))
# More than the cache has blocks for, so that some are preempted and computed anew, with what they had answered.
CROWD = ((1, BOTH), (1, PART), (1, None), (1, "alpha_sys=0.6"))
CROWD_TOKENS = 32
REFUSED = (
    ("alpha_img=x", "must be a number"),
    ("alpha_img=1,layers=40", "layers must be among"),
    ("alpha_img=1,heads=0", "must be chosen together"),
)


def run(jobs: list[dict], folder: Path, **environment: str) -> list[dict]:
    """For every job its answers by question, or `error`; the process has ended."""
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    out = folder / "answers.json"
    command = [sys.executable, "-m", "tests.vllm_worker", folder / "jobs.json", out]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=850,
        env=os.environ | environment,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return json.loads(out.read_text())


# ---- prompts ---------------------------------------------------------------------------------------------------


def prompts() -> list[list[dict]]:
    """Conversations with one image, with two, and without; the last question is not answered."""
    from tests.model.families.tiny import sample_messages

    return [
        sample_messages(1, system=True, answered=False),
        sample_messages(2, system=True, turns=2, seed=3, answered=False),
        sample_messages(0, system=True, seed=5, answered=False),
    ]


def ask(llm, processor, requests, n: int = 1, adapter=None, **sampling) -> list[dict]:
    """For every (number of a prompt, setting) its expanded ids, how many of them were cached, and its answers: the new
    ids and their log-probabilities. `adapter`: a LoRARequest."""
    from vllm import SamplingParams

    from avar_verl.intervention.vllm_hook import request_arguments
    from avar_verl.roles import RoleMap
    from avar_verl.tools.doctor.vllm_worker import answer, make_request

    # A random model would write placeholders, to which there is no image.
    placeholders = RoleMap.from_pretrained(processor, llm.model_config.hf_config).image_token_ids
    sampling = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True, **sampling}
    params = [
        SamplingParams(
            **sampling,
            n=n,
            seed=0,
            logprobs=0,
            logit_bias=dict.fromkeys(placeholders, -100.0),
            extra_args=request_arguments(spec),
        )
        for _, spec in requests
    ]
    conversations = prompts()
    asked = [make_request(processor, conversations[index]) for index, _ in requests]
    return [
        {**answer(output, completion), "num_cached": output.num_cached_tokens}
        for output in llm.generate(asked, params, use_tqdm=False, lora_request=adapter)
        for completion in output.outputs
    ]


# ---- questions -------------------------------------------------------------------------------------------------


def loaded(llm, processor, job: dict) -> list[dict]:
    return ask(llm, processor, PLAIN)


def sent(llm, processor, job: dict) -> list[dict]:
    """After the weights of `job["other"]` were sent as the engine sends them: experts one by one, under the names of
    checkpoints."""
    from transformers import AutoModelForImageTextToText
    from verl.workers.engine.fsdp.utils import unfuse_moe_params

    from avar_verl.plugin.compat.verl.weight_names import checkpoint_name

    model = AutoModelForImageTextToText.from_pretrained(job["other"])
    name_of = checkpoint_name(model)
    buffers = dict(model.named_buffers())
    weights = ((name, value) for name, value in model.state_dict().items() if name not in buffers)
    unfused = unfuse_moe_params(weights, model.config.model_type)
    llm.apply_model(lambda inner: inner.load_weights((name_of(name), value) for name, value in unfused))
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    return ask(llm, processor, PLAIN)


def adapted(llm, processor, job: dict) -> list[dict]:
    """After the weights of `job["other"]` and the adapter `job["adapter"]` were sent as verl sends those of its actor
    (verl/utils/fsdp_utils.py:715, workers/rollout/vllm_rollout/utils.py:362)."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForImageTextToText
    from verl.utils.fsdp_utils import replace_lora_wrapper
    from verl.utils.vllm.utils import TensorLoRARequest, VLLMHijack, resolve_weight_name
    from vllm.lora.request import LoRARequest

    from avar_verl.plugin.compat.verl.weight_names import checkpoint_name, peft_name

    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(job["other"]), job["adapter"])
    base, config = model.get_base_model(), model.peft_config["default"]
    name_of = peft_name(checkpoint_name(base))
    buffers = dict(base.named_buffers())
    weights = [
        (name_of(replace_lora_wrapper(name.replace(".base_layer", ""), config)), value)
        for name, value in base.state_dict().items()
        if "lora_" not in name and name not in buffers
    ]

    def load(inner) -> None:
        names = {name for name, _ in inner.named_parameters(remove_duplicate=False)}
        names.update(name for name, _ in inner.named_buffers())
        inner.load_weights((resolve_weight_name(inner, name, names), value) for name, value in weights)

    llm.apply_model(load)
    VLLMHijack.hijack()
    named = {"lora_name": "adapter", "lora_int_id": 1, "lora_path": "none"}
    tensors = {name_of(name): value for name, value in get_peft_model_state_dict(model).items()}
    llm.llm_engine.add_lora(TensorLoRARequest(**named, peft_config=config.to_dict(), lora_tensors=tensors))
    return ask(llm, processor, PLAIN, adapter=LoRARequest(**named))


def refusal(llm, processor, spec: str) -> str:
    try:
        ask(llm, processor, [(0, spec)])
    except ValueError as error:
        return str(error)
    return "none"


def stock(llm, processor, job: dict) -> dict:
    return {
        "plain": ask(llm, processor, PLAIN),
        "refused": refusal(llm, processor, BOTH),
        "nothing": ask(llm, processor, [(0, NOTHING)]),
    }


def default(llm, processor, job: dict) -> list[dict]:
    return ask(llm, processor, DEFAULT)


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


def intervened(llm, processor, job: dict) -> dict:
    answers = {
        "batch": ask(llm, processor, BATCH),
        "refused": [refusal(llm, processor, spec) for spec, _ in REFUSED],
        "several": ask(llm, processor, [(1, BOTH)], n=3, temperature=1.0),
        "preempted": [],
    }
    llm.reset_prefix_cache()
    answers["again"] = [ask(llm, processor, [(0, spec)])[0] for spec, _ in AGAIN]
    llm.reset_prefix_cache()
    answers["plain"] = ask(llm, processor, PLAIN)
    llm.reset_prefix_cache()
    answers["nothing"] = ask(llm, processor, [(index, NOTHING) for index, _ in PLAIN])
    count_preemptions(llm, answers["preempted"])
    answers["crowd"] = ask(llm, processor, CROWD, max_tokens=CROWD_TOKENS)
    return answers


QUESTIONS = {function.__name__: function for function in (loaded, sent, adapted, stock, default, intervened)}


def main(jobs: list[dict]) -> list[dict]:
    from transformers import AutoProcessor
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    from avar_verl.intervention.vllm_hook import engine_arguments

    # In float32 on the CPU experts make their activation anew in every forward pass (cpu_fused_moe.py:53), where it
    # finds no config and raises.
    cpu_fused_moe._CPU_MOE_ACT_FN[cpu_fused_moe.MoEActivation.SILU] = SiluAndMul.forward_native
    results = []
    for job in jobs:
        results.append({})
        try:
            processor = AutoProcessor.from_pretrained(job["model"])
            engine = {**ENGINE, **job["engine"]}
            if "intervene" in job:
                engine |= engine_arguments(job["intervene"])
            llm = LLM(model=job["model"], **engine)
            for name in job["ask"]:
                results[-1][name] = QUESTIONS[name](llm, processor, job)
        except Exception as error:  # One engine's failure is that engine's: the test says so.
            traceback.print_exc()
            results[-1]["error"] = f"{type(error).__name__}: {error}"
        llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
    return results


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
