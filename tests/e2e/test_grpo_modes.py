# SPDX-License-Identifier: Apache-2.0
"""GRPO with VARS through verl's launcher: other trainers, several processes, LoRA, settings of large models."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from avar_verl.tools.demo import photo_grid
from tests.compatibility import RUNS
from tests.e2e import launch

# Two minutes each on two idle cores.
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def run(tmp_path, tiny_model_path):
    """`run(name)` -> metrics by step of a launch of RUNS, with validation and a checkpoint after the second one."""
    photo_grid.make_rl_parquet(tmp_path / "rl.parquet", 12, 0, "train")
    (tmp_path / "reward.py").write_text(launch.REWARD)

    def start(name: str, *more: str, model=tiny_model_path) -> dict[int, dict]:
        overrides = [
            f"reward.custom_reward_function.path={tmp_path / 'reward.py'}",
            "avar.vars.statistic=image_share",
            "trainer.total_training_steps=2",
            "trainer.total_epochs=2",
            "trainer.save_freq=2",
            "trainer.test_freq=2",
            "data.val_batch_size=4",
            *RUNS[name],
            *more,
        ]
        metrics = launch.run(launch.grpo(tmp_path, model, tmp_path / "rl.parquet", overrides), tmp_path, name)
        assert sorted(metrics) == [1, 2]
        check_rewards(metrics, 8 if name.startswith("separate_async") else 16)
        return metrics

    return start


def check_rewards(metrics: dict[int, dict], num_rollouts: int) -> None:
    """`num_rollouts` of a batch, or of a mini-batch where a step takes them one by one."""
    for record in metrics.values():
        check_reward(record, num_rollouts)
    # Validation is measured between two batches of rollouts.
    last = metrics[2]
    assert 0 < last["val-aux/avar/photo_grid/image_share/mean@1"] < 1
    weighted, gated = (last[f"val-aux/avar/photo_grid/r_visual_{part}/mean@1"] for part in ("weighted", "gated"))
    assert weighted == pytest.approx(0.3 * gated)


def check_reward(record: dict, num_rollouts: int) -> None:
    assert record["avar/measured_rollouts"] == num_rollouts
    assert 0 < record["avar/image_share"] < 1
    assert 0 < record["avar/r_visual/gated"] <= record["avar/correct"]
    assert record["avar/r_visual/weighted"] == pytest.approx(0.3 * record["avar/r_visual/gated"], rel=1e-5)
    total = record["avar/reward/score"] + record["avar/r_visual/weighted"]
    assert record["critic/score/mean"] == pytest.approx(total, rel=1e-5)
    assert record["actor/grad_norm"] > 0


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()


def check_all_moved(tmp_path, tiny_model_path) -> None:
    before = weights(tiny_model_path)
    after = weights(tmp_path / "checkpoints" / "global_step_2" / "actor" / "huggingface")
    assert all(not torch.equal(tensor, after[key].to(tensor.dtype)) for key, tensor in before.items())


def test_colocate_async(run, tmp_path, tiny_model_path):
    """Rollouts of the second step were begun before the first update, so they are corrected for."""
    metrics = run("colocate_async")
    assert all("actor/entropy" in record and "rollout_corr/rollout_is_mean" in record for record in metrics.values())
    assert metrics[2]["training/off_policy/trajectory_staleness_worst/max"] == 1
    check_all_moved(tmp_path, tiny_model_path)


@pytest.mark.parametrize("name", ["separate_async", "separate_async_hybrid"])
def test_separate_async(run, tmp_path, tiny_model_path, name):
    """Two mini-batches of eight rollouts a step; weights reach the rollout process before the first and after each."""
    metrics = run(name)
    # vLLM starts with random weights of its own. Rollouts of the second step were begun before the first update.
    assert metrics[1]["training/rollout_actor_probs_pearson_corr"] > 0.999
    assert metrics[2]["training/rollout_actor_probs_pearson_corr"] > 0.9
    assert metrics[2]["training/off_policy/trajectory_staleness/max"] == 1
    check_all_moved(tmp_path, tiny_model_path)


def test_bypass(run, tmp_path, tiny_model_path):
    metrics = run("bypass")
    assert not any("actor/entropy" in record or "rollout_corr/rollout_is_mean" in record for record in metrics.values())
    check_all_moved(tmp_path, tiny_model_path)


def test_two_processes_and_two_rollout_servers(run, tmp_path, tiny_model_path):
    """With every setting of verl's scripts for large models that does not exclude another one."""
    metrics = run("two_processes")
    for record in metrics.values():
        assert record["training/rollout_actor_probs_pearson_corr"] > 0.99
        assert "actor/entropy_loss" in record
    check_all_moved(tmp_path, tiny_model_path)
    # The merger puts the shards of both processes together as the trainer does.
    actor = tmp_path / "checkpoints" / "global_step_2" / "actor"
    merge(actor, tmp_path / "merged")
    merged, written = weights(tmp_path / "merged"), weights(actor / "huggingface")
    assert merged.keys() == written.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-2, atol=1e-3)  # bfloat16


def test_two_nodes_end_when_a_process_dies_and_go_on_from_the_checkpoint(tmp_path, tiny_model_path):
    """The recipe's script starts a Ray cluster of two nodes; in the second step a training process of one dies."""
    photo_grid.make_rl_parquet(tmp_path / "rl.parquet", 12, 0, "train")
    (tmp_path / "reward.py").write_text(launch.REWARD)
    overrides = [
        *launch.grpo_overrides(tmp_path, tiny_model_path, tmp_path / "rl.parquet"),
        f"reward.custom_reward_function.path={tmp_path / 'reward.py'}",
        "avar.vars.statistic=image_share",
        "trainer.total_training_steps=2",
        "trainer.total_epochs=1",
        "trainer.save_freq=1",
        # Ray refuses them where it joins a cluster.
        "ray_kwargs.ray_init.num_cpus=null",
        "ray_kwargs.ray_init.num_gpus=null",
    ]

    def nodes(name: str) -> launch.Nodes:
        own = {"HEAD": "127.0.0.1", "PORT": launch.free_port(), "MODEL": str(tiny_model_path)}
        own |= {"RAY_OPTIONS": "--num-cpus=32 --object-store-memory=500000000"}
        own |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}  # The second node ends so long after the first.
        return launch.Nodes("cluster/on_every_node.sh", overrides, tmp_path, name, own)

    with nodes("first") as first:
        first.kill_training_process(tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt", 1)
        assert first.wait()[0] != 0, first.text()
    assert sorted(launch.steps(first.metrics)) == [1]
    with nodes("second") as second:
        assert second.wait() == [0, 0], second.text()
    metrics = launch.steps(second.metrics)
    assert sorted(metrics) == [2], "resuming must not repeat a step"
    for record in (*launch.steps(first.metrics).values(), *metrics.values()):
        check_reward(record, 16)
        assert record["training/rollout_actor_probs_pearson_corr"] > 0.99
    check_all_moved(tmp_path, tiny_model_path)


def merge(actor, target) -> None:
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    command += ["--local_dir", str(actor), "--target_dir", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=launch.environment(target / "x"))
    assert done.returncode == 0, done.stderr[-4000:]


# Gemma 3: its weights are renamed when they are loaded; its vision tower and projector have the layers' names, too.
FAMILY = {
    "qwen2_5_vl": [],
    "gemma3": [
        "actor_rollout_ref.actor.freeze_vision_tower=true",
        "actor_rollout_ref.actor.fsdp_config.freeze_projector=true",
        "actor_rollout_ref.model.use_remove_padding=false",
        "data.max_prompt_length=512",
        "data.max_response_length=24",
        "actor_rollout_ref.rollout.max_model_len=768",
    ],
}


@pytest.mark.parametrize(
    "name, model_type", [("lora", "qwen2_5_vl"), ("lora_merged", "qwen2_5_vl"), ("lora", "gemma3")]
)
def test_lora(run, tmp_path, family_path, name, model_type):
    """vLLM samples with the adapters; only they move; the merger writes them beside the model they belong to."""
    # So large a step that rollouts without the adapter would be another policy's.
    metrics = run(name, "actor_rollout_ref.actor.optim.lr=1e-2", *FAMILY[model_type], model=family_path(model_type))
    for record in metrics.values():
        assert record["training/rollout_actor_probs_pearson_corr"] > 0.99
    if name == "lora":
        assert metrics[2]["actor/kl_loss"] > 0 and "actor/reward_kl_penalty" in metrics[2]
    actor = tmp_path / "checkpoints" / "global_step_2" / "actor"
    merge(actor, tmp_path / "merged")
    before, after = weights(family_path(model_type)), weights(tmp_path / "merged")
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-2, atol=1e-3)  # bfloat16
    adapter = load_file(tmp_path / "merged" / "lora_adapter" / "adapter_model.safetensors")
    assert {key.rpartition(".lora_")[2] for key in adapter} == {"A.weight", "B.weight"}
    assert all(bool(tensor.abs().max() > 1e-4) for key, tensor in adapter.items())
    config = json.loads((tmp_path / "merged" / "lora_adapter" / "adapter_config.json").read_text())
    assert config["r"] == 8 and sorted(config["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
