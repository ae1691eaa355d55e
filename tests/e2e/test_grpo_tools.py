# SPDX-License-Identifier: Apache-2.0
"""GRPO with a tool that returns images, through verl's launcher: a cold start teaches the call, rollouts make it."""

import json
import re

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests.e2e import launch, tool_data

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(2400)]

TOOLS = """
tools:
  - class_name: avar_verl.plugin.rollout.zoom_in.ImageZoomIn
    config: {type: native, coordinates: absolute}
"""
# What rewards are made of here: what the policy wrote and the sizes of the images.
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = float(len(solution_str) % 2)
    tools = extra_info.get("tool_image_sizes") or []
    parts = {"own_images": float(len(extra_info["image_sizes"])), "tool_images": float(len(tools))}
    return {"score": right, "acc": right, "turns": float(extra_info["num_turns"]), **parts}
"""
# Of one length, but for the answer.
WELL_FORMED = re.compile(r"<tool_call>\n.{60,80}\n</tool_call><answer>\w+</answer>")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_path):
    """(folder of the run, checkpoint of the cold start, metrics by step) by value of `avar.vars.images`.

    After 72 steps the policy calls the tool nearly always; after 120 it would always answer right, too, without an
    advantage in any group.
    """
    work = tmp_path_factory.mktemp("tools")
    tool_data.make_sft(work / "sft.parquet", 192)
    tool_data.make_rl(work / "rl.parquet", 8)
    (work / "tools.yaml").write_text(TOOLS)
    (work / "reward.py").write_text(REWARD)
    cold = [
        *launch.sft_overrides(work, tiny_model_path, work / "sft.parquet"),
        "data.max_length=512",
        "data.train_batch_size=16",
        "data.micro_batch_size_per_gpu=16",
        "optim.lr=4e-3",
        "avar.agto.alpha=0",
        "avar.agto.beta=0",
        "trainer.total_training_steps=72",
        "trainer.total_epochs=6",
        "trainer.save_freq=72",
    ]
    launch.run(launch.sft(work, cold), work, "sft")
    start = work / "checkpoints" / "global_step_72" / "huggingface"
    out = {}
    for images in ("prompt", "all"):
        folder = work / images
        folder.mkdir()
        overrides = [
            "actor_rollout_ref.rollout.agent.default_agent_loop=avar_tool_agent",
            f"actor_rollout_ref.rollout.multi_turn.tool_config_path={work / 'tools.yaml'}",
            "actor_rollout_ref.rollout.multi_turn.max_assistant_turns=2",
            f"reward.custom_reward_function.path={work / 'reward.py'}",
            f"avar.vars.images={images}",
            "avar.vars.statistic=image_share",
            "avar.vars.measure_dependency=true",
            f"avar.vars.corruption={'swap' if images == 'prompt' else 'blank'}",
            "data.max_response_length=200",
            "data.seed=0",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            f"trainer.total_training_steps={2 if images == 'prompt' else 1}",
            "trainer.total_epochs=1",
            "trainer.save_freq=2",
        ]
        out[images] = (
            folder,
            start,
            launch.run(launch.grpo(folder, start, work / "rl.parquet", overrides), folder, "log"),
        )
    return out


def rollouts(folder, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts" / f"{step}.jsonl").read_text().splitlines()]


def test_rollouts_call_the_tool_and_its_images_are_written(runs):
    folder, _, metrics = runs["prompt"]
    assert sorted(metrics) == [1, 2]
    for step, record in metrics.items():
        rows = rollouts(folder, step)
        called = [row for row in rows if row["tool_images"]]
        assert len(rows) == 16 and len(called) >= 8
        assert record["avar/reward/tool_images"] == pytest.approx(len(called) / 16)
        assert record["avar/reward/own_images"] == 1 and record["avar/reward/reward_failed"] == 0
        for row in called:
            (part,) = row["tool_images"]
            with Image.open(folder / "rollouts" / part) as stored:
                assert min(stored.size) >= 28
            assert row["parts"]["turns"] == 4 and len(row["extra_info"]["tool_image_sizes"]) == 1
            assert row["extra_info"]["image_sizes"] == [[112, 112]]
            # The reward and the page read what the policy wrote; the whole conversation is beside it.
            assert "<|vision_start|>" in row["transcript"] and "<|im_start|>tool" in row["transcript"]
            assert "tool_call" in row["output"] and "<|im_start|>" not in row["output"]


def test_the_policy_is_trained_on_what_vllm_has_seen(runs):
    folder, start, metrics = runs["prompt"]
    for record in metrics.values():
        # The same ids, the same images in the same order: of the prompt and of the tool.
        assert record["training/rollout_actor_probs_pearson_corr"] > 0.99
        assert record["avar/measured_rollouts"] == 16
        assert 0 < record["avar/image_share"] < 1 and "avar/dependency" in record
        total = record["avar/reward/score"] + record["avar/r_visual/weighted"]
        assert record["critic/score/mean"] == pytest.approx(total, rel=1e-5)
    assert any(record["actor/grad_norm"] > 0 for record in metrics.values())
    before = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32).state_dict()
    trained = folder / "checkpoints" / "global_step_2" / "actor" / "huggingface"
    after = AutoModelForImageTextToText.from_pretrained(trained, dtype=torch.float32).state_dict()
    assert sum(not torch.equal(tensor, after[name]) for name, tensor in before.items()) > 0.9 * len(before)


def test_with_all_images_calling_the_tool_pays(runs):
    """Of every prompt, by the same policy: images of tools have a mass of their own; that of the system is the same."""
    means: dict[str, dict[int, list]] = {}
    for images, (folder, _, _) in runs.items():
        for row in rollouts(folder, 1):
            if row["tool_images"] and WELL_FORMED.fullmatch(row["output"]):
                visual = row["visual"]
                of_prompt = means.setdefault(images, {}).setdefault(row["extra_info"]["index"], [])
                of_prompt.append((visual["image_mass"], visual["system_mass"]))
    called = means["prompt"].keys() & means["all"].keys()
    assert called, "the same prompts in both runs"
    for index in called:
        own, both = (torch.tensor(means[images][index]).mean(0).tolist() for images in ("prompt", "all"))
        assert both[0] > own[0] > 0.05 and both[1] == pytest.approx(own[1], rel=0.1)
