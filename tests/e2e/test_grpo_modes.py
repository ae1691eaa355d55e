# SPDX-License-Identifier: Apache-2.0
"""GRPO with VARS through verl's launcher in other modes: asynchronous trainers, bypass of old_log_probs."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from avar_verl.tools.demo import photo_grid
from tests.e2e import launch

# Two starts of Ray, vLLM and the trainer.
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

MODE = "trainer.v1.trainer_mode"
CORRECTION = "algorithm.rollout_correction"
# Overrides, whether old_log_probs are computed.
MODES = {
    "colocate_async": ([f"{MODE}=avar_colocate_async", f"{CORRECTION}.rollout_is=token"], True),
    "bypass": ([f"{CORRECTION}.bypass_mode=true"], False),
}


@pytest.mark.parametrize("name", MODES)
def test_two_steps(tmp_path, tiny_model_path, name):
    photo_grid.make_rl_parquet(tmp_path / "rl.parquet", 12, 0, "train")
    (tmp_path / "reward.py").write_text(launch.REWARD)
    own, recomputes = MODES[name]
    overrides = [
        f"reward.custom_reward_function.path={tmp_path / 'reward.py'}",
        "avar.vars.statistic=image_share",
        "trainer.total_training_steps=2",
        "trainer.total_epochs=2",
        "trainer.save_freq=2",
        "trainer.test_freq=2",
        "data.val_batch_size=4",
        *own,
    ]
    command = launch.grpo(tmp_path, tiny_model_path, tmp_path / "rl.parquet", overrides)
    metrics = launch.run(command, tmp_path, name)
    assert sorted(metrics) == [1, 2]
    for record in metrics.values():
        assert record["avar/measured_rollouts"] == 16
        assert 0 < record["avar/image_share"] < 1
        assert 0 < record["avar/r_visual/gated"] <= record["avar/correct"]
        assert record["avar/r_visual/weighted"] == pytest.approx(0.3 * record["avar/r_visual/gated"], rel=1e-5)
        total = record["avar/reward/score"] + record["avar/r_visual/weighted"]
        assert record["critic/score/mean"] == pytest.approx(total, rel=1e-5)
        assert record["actor/grad_norm"] > 0
        assert ("actor/entropy" in record) == recomputes
        assert ("rollout_corr/rollout_is_mean" in record) == recomputes
    # Validation is measured between two batches of rollouts, and training goes on after it.
    last = metrics[2]
    assert 0 < last["val-aux/avar/photo_grid/image_share/mean@1"] < 1
    weighted, gated = (last[f"val-aux/avar/photo_grid/r_visual_{part}/mean@1"] for part in ("weighted", "gated"))
    assert weighted == pytest.approx(0.3 * gated)
    before = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32).state_dict()
    folder = tmp_path / "checkpoints" / "global_step_2" / "actor" / "huggingface"
    after = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(not torch.equal(tensor, after[key].to(tensor.dtype)) for key, tensor in before.items())
