# SPDX-License-Identifier: Apache-2.0
"""Data and settings for training any family: photo grids, two images in one sample, and text only, in turn."""

from pathlib import Path

import pandas

from avar_verl.model.families import FAMILIES, get_family
from avar_verl.tools.demo import photo_grid
from tests.e2e import launch
from tests.model.families.tiny import OUTSIDE, SPECS

SYSTEM = {"role": "system", "content": "Look at the image."}
# Families with no system turn in their chat templates.
WITHOUT_SYSTEM = ("gemma3",)
# vLLM's gated DeltaNet on the CPU (vllm/model_executor/layers/mamba/ops/cpu/gdn_attention.py:53) takes nothing else.
BFLOAT16_ROLLOUTS = ("qwen3_5", "qwen3_5_moe", "minicpmv4_6")
# vLLM does not read the scaling of queries from a Hugging Face folder (vllm/model_executor/models/mistral.py:106): in
# the tiny model from position 32 on, in the checkpoints from 16384 on.
UNSCALED_ROLLOUTS = ("mistral3",)
# vLLM's short convolution needs Triton (vllm/model_executor/layers/mamba/ops/causal_conv1d.py:567), which no CPU has.
GPU_ROLLOUTS = ("lfm2_vl",)


def guidance(model_type: str) -> list[str]:
    """Where no softmax has image and system keys there is L_suppress only."""
    crosses = model_type in FAMILIES and get_family(model_type).cross_attention
    return ["avar.agto.alpha=0"] if crosses else []


def rollouts(model_type: str) -> list[str]:
    """Settings of vLLM's linear attention on the CPU: its state is float32."""
    if model_type not in BFLOAT16_ROLLOUTS:
        return []
    rollout = "actor_rollout_ref.rollout"
    # vLLM reads the state's type from the configs of Qwen3.5, not from that of MiniCPM-V
    # (vllm/model_executor/models/config.py:704).
    return [f"{rollout}.dtype=bfloat16", f"+{rollout}.engine_kwargs.vllm.mamba_ssm_cache_dtype=float32"]


def template(model_type: str) -> list[str]:
    """Settings with which the chat template's prompts end before a thought."""
    kwargs = (SPECS | OUTSIDE)[model_type].template_kwargs
    return [f"++data.apply_chat_template_kwargs.{name}={value}" for name, value in kwargs.items()]


def sft_overrides(work: Path, model: Path, data: Path, model_type: str, packed: bool) -> list[str]:
    """Two steps of four samples."""
    return [
        *launch.sft_overrides(work, model, data),
        f"model.use_remove_padding={packed}",
        "data.max_length=1024",
        "data.train_batch_size=4",
        f"data.micro_batch_size_per_gpu={2 if packed else 1}",
        *guidance(model_type),
        *template(model_type),
        "trainer.total_epochs=1",
        "trainer.save_freq=2",
        "checkpoint.save_contents=[hf_model]",
    ]


def _text_only(row: dict) -> dict:
    messages = [{**message, "content": message["content"].replace("<image>", "")} for message in row["messages"]]
    return {**row, "messages": messages, "images": []}


def _two_images(row: dict, other: dict) -> dict:
    question, answer = row["messages"]
    content = "<image>" + question["content"]
    return {**row, "messages": [{**question, "content": content}, answer], "images": [*row["images"], *other["images"]]}


def make_sft(path: Path, n: int, model_type: str) -> Path:
    """n rows: every second one is text only, every fourth has two images."""
    photo_grid.make_sft_parquet(path, n, 0, "train")
    rows = pandas.read_parquet(path).to_dict("records")
    for index, row in enumerate(rows):
        row["messages"], row["images"] = list(row["messages"]), list(row["images"])
        if index % 4 == 2:
            row.update(_two_images(row, rows[index - 2]))
        elif index % 2:
            row.update(_text_only(row))
        if model_type not in WITHOUT_SYSTEM:
            row["messages"] = [SYSTEM, *row["messages"]]
    pandas.DataFrame(rows).to_parquet(path)
    return path


def make_rl(path: Path, n: int, model_type: str) -> Path:
    """n prompts with an image, the first with a second one."""
    photo_grid.make_rl_parquet(path, n, 0, "train")
    rows = pandas.read_parquet(path).to_dict("records")
    for index, row in enumerate(rows):
        row["prompt"], row["images"] = [dict(message) for message in row["prompt"]], list(row["images"])
        if index == 0:
            row["prompt"][0]["content"] = "<image>" + row["prompt"][0]["content"]
            row["images"] = [*row["images"], *rows[1]["images"]]
        if model_type not in WITHOUT_SYSTEM:
            row["prompt"] = [SYSTEM, *row["prompt"]]
    pandas.DataFrame(rows).to_parquet(path)
    return path
