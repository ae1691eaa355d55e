# SPDX-License-Identifier: Apache-2.0
"""Time of vLLM generation under an intervention, compared in one run with an engine that was not started for it.

    python benchmarks/intervention.py [--repeats 15] [--new-tokens 64]

Random Qwen2.5-VL models of two sizes in eager vLLM on the CPU, eight prompts at once, each with 128 image tokens, a
long system turn and a question; no prefix caching, so every repeat prefills. Two engines in one process take turns:

- `stock`: not started for the intervention
- `told`: started for it, but no request asks for it
- `asked`: the same engine, and every request asks for alpha_img=0.15,alpha_sys=0.4

Ratios are medians over repeats of the CPU time of the process (the engine runs in it, on one thread), which other load
on the machine affects least.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

SPEC = "alpha_img=0.15,alpha_sys=0.4"
NUM_PROMPTS, NUM_IMAGES, SYSTEM_WORDS = 8, 8, 160
MODELS = {
    "the demo's": {},
    "512 wide, 8 layers": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [8, 12, 12]},
    },
}


def make_prompts(path: Path) -> list:
    """Prompts for vLLM, each with different photographs and words."""
    from vllm import TokensPrompt

    from avar_verl.data.messages import images_of
    from avar_verl.model.checkpoint import load_processor
    from avar_verl.model.render import render
    from avar_verl.tools.demo import photo_grid

    rng = random.Random(0)
    processor = load_processor(path)
    samples = photo_grid.make_samples(NUM_PROMPTS * NUM_IMAGES, 0, "train")
    prompts = []
    for number in range(NUM_PROMPTS):
        shown = samples[number * NUM_IMAGES : (number + 1) * NUM_IMAGES]
        blocks = [{"type": "image", "image": sample.image} for sample in shown]
        system = " ".join(rng.choice(photo_grid.NAMES) for _ in range(SYSTEM_WORDS))
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": [*blocks, {"type": "text", "text": shown[0].question}]},
        ]
        rendered = render(processor, messages, add_generation_prompt=True)
        images = images_of(messages)
        prompts.append(TokensPrompt(prompt_token_ids=rendered.prompt_ids, multi_modal_data={"image": images}))
    return prompts


def measure(path: Path, repeats: int, new_tokens: int) -> dict[str, list[float]]:
    """CPU seconds of every repeat, by variant."""
    from vllm import LLM, SamplingParams

    from avar_verl.intervention.vllm_hook import engine_arguments, request_arguments

    def start(**arguments) -> LLM:
        return LLM(
            model=str(path),
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=1024,
            max_num_batched_tokens=2048,
            max_num_seqs=NUM_PROMPTS,
            limit_mm_per_prompt={"image": NUM_IMAGES, "video": 0},
            skip_mm_profiling=True,
            seed=0,
            **arguments,
        )

    prompts = make_prompts(path)
    stock, told = start(), start(**engine_arguments())
    variants = {"stock": (stock, None), "told": (told, None), "asked": (told, SPEC)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 2):
        # In a different order in every repeat.
        for name in random.Random(turn).sample(list(variants), len(variants)):
            llm, spec = variants[name]
            params = SamplingParams(
                temperature=0.0,
                max_tokens=new_tokens,
                ignore_eos=True,
                detokenize=False,  # Variants generate different tokens, whose decoding takes different time.
                extra_args=request_arguments(spec),
            )
            begin = time.process_time()
            llm.generate(prompts, params, use_tqdm=False)
            if turn >= 2:
                seconds[name].append(time.process_time() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="repeats; four times as many for the small model")
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    from avar_verl.tools.demo.tiny_model import build_tiny_model

    rows = ["| model | engine | seconds | / stock | 80 % of the repeats |", "| --- | --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, overrides) in enumerate(MODELS.items()):
            path = build_tiny_model(Path(folder) / str(number), **overrides)
            seconds = measure(path, arguments.repeats * (1 if overrides else 4), arguments.new_tokens)
            for variant, values in seconds.items():
                ratios = sorted(value / stock for value, stock in zip(values, seconds["stock"], strict=True))
                cut = len(ratios) // 10
                spread = f"{ratios[cut]:.2f} to {ratios[-1 - cut]:.2f}"
                ratio = statistics.median(ratios)
                rows.append(f"| {name} | {variant} | {statistics.median(values):.3f} | {ratio:.3f} x | {spread} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
