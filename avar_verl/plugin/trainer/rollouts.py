# SPDX-License-Identifier: Apache-2.0
"""What `trainer.rollout_data_dir` gets beyond verl's text and score: parts, masses, dependency and images.

Shape suffixes: B = rollouts, F = fields of VISUAL_FIELDS
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from avar_verl.data.images import as_verl_image, image_file, write_new
from avar_verl.data.messages import blocks_of
from avar_verl.objectives.vars import VISUAL_FIELDS
from avar_verl.plugin.config import OWN_TOKENS, TOOL_FILES, VISUAL_OUTPUT, VarsConfig
from avar_verl.plugin.rollout.reward_manager import own_tokens, prompt_text
from avar_verl.plugin.trainer.rewards import gate_if_any, reward_infos, validation_parts
from avar_verl.rewards.compose import BOXES, BOXES_SIZE, IMAGE_SIZES, PROMPT

IMAGES = "images"
"""Folder of the images, in the folder of the rollouts."""
# Of what the reward function saw beside the response; the rest of `extra_info` may be of any type and size.
OF_ROW = ("index", BOXES, BOXES_SIZE)
OF_ROLLOUT = (IMAGE_SIZES, "image_grids", "tool_image_sizes", "tool_image_grids")


def sort_key(key: str) -> tuple[str, int, int]:
    """Of a rollout's key `{prompt}_{rollout}_{output}`, which puts rollouts of a prompt together."""
    prompt, rollout, output = key.rsplit("_", 2)
    return prompt, int(rollout), int(output)


def images_of(messages: Sequence[Mapping]) -> list[Any]:
    """Values of the images of a conversation, in order."""
    blocks = [block for message in messages for block in blocks_of(message["content"]) if block["type"] == "image"]
    return [block.get("image_url", block) for block in blocks]


def image_reference(value: Any, files: dict[str, bytes]) -> str:
    """Path of an image relative to the rollouts, whose file is added to `files`; of a web address, the address."""
    held = as_verl_image(value)
    if isinstance(held.get("image"), str) and held["image"].startswith(("http://", "https://")):
        return held["image"]
    name, content = image_file(value)
    files[name] = content
    return f"{IMAGES}/{name}"


def write_images(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_new(folder / name, content)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def visual_columns(visual_BF: torch.Tensor, infos: list[dict], prompts: list, vars_config: VarsConfig) -> list[dict]:
    """What was measured of each rollout by name: masses, `dependency`, `r_visual_*`; None where it is not defined."""
    names = VISUAL_FIELDS if vars_config.measures_masses else ()
    names = tuple(name for name in names if not name.startswith("num_") and name != "dependency")
    masses = [{name: finite(float(row_F[VISUAL_FIELDS.index(name)])) for name in names} for row_F in visual_BF.unbind()]
    parts = validation_parts(visual_BF, infos, prompts, vars_config)
    return [{**mass, **part} for mass, part in zip(masses, parts, strict=True)]


def rollout_columns(
    batch: KVBatchMeta, tokenizer, vars_config: VarsConfig, skip_special_tokens: bool
) -> tuple[dict[str, list], dict[str, list], dict[str, bytes]]:
    """The rollouts of a step, without padding, in the order of `sort_key`: verl's columns, ours, and files of images.

    Ours:
        uid: key of the rollout.
        data_source: of the prompt's row.
        correct: the gate of r_visual; None without a reward function.
        parts: what the reward function returned.
        visual: masses, dependency and r_visual of the response (`visual_columns`).
        advantage: mean over the tokens of the response that are trained on; None without one.
        images: references (`image_reference`) of the prompt's images.
        tool_images: of those that tools returned.
        transcript: the response with the turns of tools and special tokens, where tools were called; else None.
        extra_info: what the reward function saw of OF_ROW, OF_ROLLOUT and the prompt's text.

    The output is that of the reward function: what the policy wrote (`own_tokens`), decoded with
    `avar.reward.skip_special_tokens`.
    """
    keys = sorted(
        (key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)), key=sort_key
    )
    fields = ["uid", "prompts", "responses", "rm_scores", "reward_model", "data_source", "extra_fields", "extra_info"]
    fields += ["advantages", "response_mask"] + ([VISUAL_OUTPUT] if vars_config.measures else [])
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
    prompts = list(data["uid"])
    extras = [dict(extra) for extra in data["extra_fields"]]
    infos = reward_infos(extras)
    correct_B = gate_if_any(infos, [True] * len(keys), vars_config)
    visual = [{}] * len(keys)
    if vars_config.measures:
        visual_BF = torch.stack(list(data[VISUAL_OUTPUT].unbind())).float()
        visual = visual_columns(visual_BF, infos, prompts, vars_config)
    advantages = [
        float(row[mask.bool()].mean()) if mask.any() else None
        for row, mask in zip(data["advantages"].unbind(), data["response_mask"].unbind(), strict=True)
    ]

    # A prompt is the same in all of its rollouts, and its images are large: one is fetched.
    first = {prompt: key for prompt, key in zip(reversed(prompts), reversed(keys), strict=True)}
    raw = tq.kv_batch_get(keys=list(first.values()), partition_id=batch.partition_id, select_fields=["raw_prompt"])
    files: dict[str, bytes] = {}
    seen = {
        prompt: ([image_reference(value, files) for value in images_of(messages)], prompt_text(messages))
        for prompt, messages in zip(first, raw["raw_prompt"], strict=True)
    }
    for extra in extras:
        files.update(extra.get(TOOL_FILES) or [])
    rows = [info or {} for info in data["extra_info"]]
    verls = {
        "inputs": [tokenizer.decode(ids, skip_special_tokens=True) for ids in data["prompts"].unbind()],
        "outputs": [
            tokenizer.decode(own_tokens(ids, extra.get(OWN_TOKENS)), skip_special_tokens=skip_special_tokens)
            for ids, extra in zip(data["responses"].unbind(), extras, strict=True)
        ],
        "gts": [model["ground_truth"] for model in data["reward_model"]],
        "scores": [float(scores.sum()) for scores in data["rm_scores"].unbind()],
    }
    ours = {
        "uid": keys,
        "data_source": list(data["data_source"]),
        "correct": [None] * len(keys) if correct_B is None else correct_B.tolist(),
        "parts": infos,
        "visual": visual,
        "advantage": advantages,
        "images": [seen[prompt][0] for prompt in prompts],
        "tool_images": [[f"{IMAGES}/{name}" for name, _ in extra.get(TOOL_FILES) or []] for extra in extras],
        "transcript": [
            tokenizer.decode(ids, skip_special_tokens=False) if OWN_TOKENS in extra else None
            for ids, extra in zip(data["responses"].unbind(), extras, strict=True)
        ],
        "extra_info": [
            {
                **{name: row[name] for name in OF_ROW if row.get(name) is not None},
                **{name: extra[name] for name in OF_ROLLOUT if extra.get(name) is not None},
                PROMPT: seen[prompt][1],
            }
            for row, extra, prompt in zip(rows, extras, prompts, strict=True)
        ],
    }
    return verls, ours, files
