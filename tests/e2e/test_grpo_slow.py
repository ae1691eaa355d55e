# SPDX-License-Identifier: Apache-2.0
"""GRPO through verl's launcher: every shipped reward, chosen by one override; every family; the engine's own guard."""

import os
import subprocess

import pandas as pd
import pytest
import torch
from transformers import AutoModelForImageTextToText

from avar_verl.model.families import FAMILIES
from avar_verl.tools.demo import photo_grid
from tests.e2e import family_data, launch

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

REWARD = "reward.custom_reward_function"
PIXELS = [f"+{REWARD}.reward_kwargs.coordinates=absolute"]
PARTS = "{acc:{weight:1.0},anchor:{weight:0.3,gate:acc,settings:{coordinates:absolute}}}"
# (overrides beside the path, parts in the log)
REWARDS = {
    "avar": ([], ["acc", "format"]),
    "accuracy": ([], ["acc"]),
    "format": ([], ["acc", "format"]),
    "visual_anchor": (PIXELS, ["acc", "format", "anchor", "num_distinct_anchors"]),
    "grounding_iou": ([*PIXELS, "avar.vars.region=true"], ["acc", "grounding", "num_boxes"]),
    "compose": ([f"+{REWARD}.reward_kwargs.parts={PARTS}"], ["acc", "anchor"]),
}


@pytest.mark.parametrize("name", REWARDS)
def test_parts_are_in_the_training_and_the_validation_log(tmp_path, tiny_model_path, name):
    photo_grid.make_rl_parquet(tmp_path / "rl.parquet", 4, 0, "train")
    rows = pd.read_parquet(tmp_path / "rl.parquet")
    rows["extra_info"] = [{**info, "boxes": [[0, 0, 56, 56]], "boxes_size": [112, 112]} for info in rows["extra_info"]]
    rows.to_parquet(tmp_path / "rl.parquet")
    extra, parts = REWARDS[name]
    overrides = [
        f"{REWARD}.path=pkg://reward_fns.{name}",
        "avar.vars.statistic=image_share",
        "trainer.total_training_steps=1",
        "trainer.total_epochs=1",
        "trainer.save_freq=-1",
        "trainer.test_freq=1",
        "data.val_batch_size=4",
        *extra,
    ]
    command = launch.grpo(tmp_path, tiny_model_path, tmp_path / "rl.parquet", overrides)
    record = launch.run(command, tmp_path, name)[1]
    for part in parts:
        assert f"avar/reward/{part}" in record, part
        assert any(key.startswith("val-") and f"/{part}/" in key for key in record), part
    assert record["avar/reward/reward_failed"] == 0
    total = record["avar/reward/score"] + record["avar/r_visual/weighted"]
    assert record["critic/score/mean"] == pytest.approx(total, rel=1e-5)


# Llama 3.2 Vision is not in vLLM 0.24.
NOT_HERE = ("mllama", *family_data.UNSCALED_ROLLOUTS, *family_data.GPU_ROLLOUTS)


@pytest.mark.parametrize("model_type", [name for name in sorted(FAMILIES) if name not in NOT_HERE])
def test_grpo_with_vllm_rollouts(family_path, tmp_path, model_type):
    family_data.make_rl(tmp_path / "rl.parquet", 4, model_type)
    (tmp_path / "reward.py").write_text(launch.REWARD)
    overrides = [
        "actor_rollout_ref.model.use_remove_padding=false",
        "data.max_prompt_length=512",
        "data.max_response_length=24",
        "actor_rollout_ref.rollout.max_model_len=768",
        f"reward.custom_reward_function.path={tmp_path / 'reward.py'}",
        "avar.vars.statistic=image_share",
        *family_data.guidance(model_type),
        *family_data.rollouts(model_type),
        "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
        "trainer.total_training_steps=2",
        "trainer.total_epochs=2",
        "trainer.save_freq=2",
    ]
    command = launch.grpo(tmp_path, family_path(model_type), tmp_path / "rl.parquet", overrides)
    metrics = launch.run(command, tmp_path, "grpo")
    assert sorted(metrics) == [1, 2]
    for record in metrics.values():
        assert record["avar/measured_rollouts"] == 16
        assert 0 < record["avar/image_share"] < 1
        assert record["actor/grad_norm"] > 0
        # vLLM and the actor saw the same tokens and the same image, before the update and after it.
        assert record["training/rollout_actor_probs_pearson_corr"] > 0.99
    before = AutoModelForImageTextToText.from_pretrained(family_path(model_type), dtype=torch.float32).state_dict()
    folder = tmp_path / "checkpoints" / "global_step_2" / "actor" / "huggingface"
    after = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert any(not torch.equal(tensor, after[name].to(tensor.dtype)) for name, tensor in before.items())


# A trainer that the refusals before the start let through: its log-prob pass and its advantage are verl's.
FORGETFUL = """
import avar_verl.plugin.register  # verl loads external modules before its plugins, and with them the platform

from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from avar_verl.plugin.trainer.ppo import AvarPPOTrainer

@register_trainer("forgetful")
class Forgetful(AvarPPOTrainer):
    _compute_old_log_prob = PPOTrainerSync._compute_old_log_prob
    _compute_advantage = PPOTrainerSync._compute_advantage
"""


def test_a_trainer_that_does_not_measure_ends_at_its_first_update(tmp_path, tiny_model_path):
    photo_grid.make_rl_parquet(tmp_path / "rl.parquet", 4, 0, "train")
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    (tmp_path / "reward.py").write_text(launch.REWARD)
    overrides = [
        "trainer.v1.trainer_mode=forgetful",
        f"{REWARD}.path={tmp_path / 'reward.py'}",
        "trainer.total_training_steps=1",
        "trainer.total_epochs=1",
        "trainer.save_freq=-1",
    ]
    command = launch.grpo(tmp_path, tiny_model_path, tmp_path / "rl.parquet", overrides)
    environment = launch.environment(tmp_path / "metrics.jsonl")
    environment |= {
        "VERL_USE_EXTERNAL_MODULES": "forgetful",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))),
    }
    with (tmp_path / "log").open("w") as log:
        ended = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=600)
    text = (tmp_path / "log").read_text(errors="replace")
    assert ended.returncode != 0
    assert "avar.vars needs the measurements of a log-prob pass before the first update" in text, text[-6000:]
    assert launch.steps(tmp_path / "metrics.jsonl") == {}
