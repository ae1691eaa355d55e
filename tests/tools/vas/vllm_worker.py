# SPDX-License-Identifier: Apache-2.0
"""Rows that vLLM has answered, in a process of its own: `python -m tests.tools.vas.vllm_worker MODEL OUT`."""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

from transformers import AutoConfig, AutoProcessor
from vllm import LLM, SamplingParams, TokensPrompt

from avar_verl.model.render import render
from avar_verl.plugin.rollout.agent_loop import forbid
from avar_verl.roles import RoleMap
from avar_verl.tools.demo import photo_grid


def main(model: str, out: str) -> None:
    processor = AutoProcessor.from_pretrained(model)
    role_map = RoleMap.from_pretrained(processor, AutoConfig.from_pretrained(model))
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 1, "video": 0},
        skip_mm_profiling=True,
        seed=0,
    )
    sampling = SamplingParams(
        **forbid({"temperature": 1.0, "seed": 0, "max_tokens": 24}, list(role_map.image_token_ids))
    )
    samples = photo_grid.make_samples(4, 0, "test")
    requests, rows = [], []
    for sample in samples:
        block = {"type": "image", "image": sample.image}
        messages = [{"role": "user", "content": [block, {"type": "text", "text": sample.question}]}]
        prompt_ids = render(processor, messages, add_generation_prompt=True).prompt_ids
        requests.append(TokensPrompt(prompt_token_ids=prompt_ids, multi_modal_data={"image": [sample.image]}))
        path = Path(out).with_name(f"{sample.index}.png")
        sample.image.save(path)
        rows.append({"prompt": [{"role": "user", "content": f"<image>{sample.question}"}], "images": [str(path)]})
    for row, output in zip(rows, llm.generate(requests, sampling, use_tqdm=False), strict=True):
        row["response_ids"] = list(output.outputs[0].token_ids)
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
