# SPDX-License-Identifier: Apache-2.0
"""verl's advantages from the sum of both rewards, for every estimator and correction of docs/compatibility.md."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from transfer_queue import KVBatchMeta
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass

from avar_verl.objectives.alarms import RiseAlarm
from avar_verl.objectives.vars import VISUAL_FIELDS
from avar_verl.plugin.config import VISUAL_OUTPUT
from avar_verl.plugin.refusals import NOT_IN_V1
from avar_verl.plugin.trainer.ppo import AvarPPOTrainer
from tests.compatibility import ROWS
from tests.plugin.test_refusals import configured
from tests.plugin.trainer.test_replay_buffer import buffer_of, put_group

# Three rollouts of prompt a, three of b; all but the last right.
KEYS = ["a_0_0", "a_1_0", "a_2_0", "b_0_0", "b_1_0", "b_2_0"]
LENGTHS = [2, 4, 3, 1, 2, 3]
RATIOS = [1.0, 2.0, 6.0, 4.0, 9.0, 5.0]
ACCS = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def advantages(queue, cls: type, config, scores: list[float]) -> tuple[list[torch.Tensor], dict]:
    """What `cls._compute_advantage` writes for these rewards, and its metrics."""
    draw = torch.Generator().manual_seed(0)
    log_probs = [-torch.rand(length, generator=draw) for length in LENGTHS]
    visual = torch.full((len(KEYS), len(VISUAL_FIELDS)), 0.5)
    visual[:, VISUAL_FIELDS.index("ratio")] = torch.tensor(RATIOS)
    rewards = [torch.tensor([0.0] * (n - 1) + [score]) for n, score in zip(LENGTHS, scores, strict=True)]
    fields = {
        "uid": NonTensorStack(*(key[0] for key in KEYS)),
        "response_mask": nested([torch.ones(n, dtype=torch.long) for n in LENGTHS]),
        "rm_scores": nested(rewards),
        "old_log_probs": nested(log_probs),
        "rollout_log_probs": nested([row + 0.02 * (i - 2) for i, row in enumerate(log_probs)]),
        "ref_log_prob": nested([row - 0.1 for row in log_probs]),
        "extra_fields": NonTensorStack(*({"reward_extra_info": {"acc": acc}} for acc in ACCS)),
        VISUAL_OUTPUT: visual,
    }
    tags = [{"is_padding": False} for _ in KEYS]
    queue.kv_batch_put(
        keys=KEYS, partition_id="train", fields=TensorDict(fields, batch_size=len(KEYS)), tags=[dict(t) for t in tags]
    )
    trainer = object.__new__(cls)
    trainer.config = config
    trainer.vars = omega_conf_to_dataclass(config.avar.vars)
    trainer._rise_alarm = RiseAlarm(0)
    if config.algorithm.use_kl_in_reward:
        trainer.kl_ctrl_in_reward = core_algos.get_kl_controller(config.algorithm.kl_ctrl)
    metrics: dict = {}
    try:
        trainer._compute_advantage(KVBatchMeta(keys=list(KEYS), tags=tags, partition_id="train"), metrics)
        names = ["advantages", "returns", "response_mask"]
        data = queue.kv_batch_get(keys=KEYS, partition_id="train", select_fields=[*names, "rollout_is_weights"])
        return [row for name in sorted(data.keys()) for row in data[name].unbind()], metrics
    finally:
        queue.kv_clear(keys=list(KEYS), partition_id="train")


@pytest.mark.e2e
@pytest.mark.parametrize("row", [row for row in ROWS if row.test == "advantage"], ids=lambda row: row.what)
def test_the_advantage_is_verls_of_the_sum(queue, row):
    config = configured("avar_grpo", "machine=cpu_grpo", *row.settings, "actor_rollout_ref.rollout.n=3")
    weight = config.avar.vars.lambda_v
    total = [acc + weight * acc * ratio for acc, ratio in zip(ACCS, RATIOS, strict=True)]
    ours, metrics = advantages(queue, AvarPPOTrainer, config, ACCS)
    verls, stock = advantages(queue, PPOTrainerSync, config, total)
    assert len(ours) == len(verls)
    for got, expected in zip(ours, verls, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    without, _ = advantages(queue, PPOTrainerSync, config, ACCS)
    assert any(not torch.equal(got, other) for got, other in zip(ours, without, strict=True)), "r_visual does nothing"
    for key, value in stock.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    assert metrics["avar/r_visual/weighted"] == pytest.approx(weight * 22 / 6)


@pytest.mark.e2e
@pytest.mark.parametrize("estimator", NOT_IN_V1)
def test_estimators_that_are_refused_fail_in_verls_trainer(queue, estimator):
    config = configured("avar_grpo", "machine=cpu_grpo", f"algorithm.adv_estimator={estimator}")
    with pytest.raises((AssertionError, KeyError, TypeError)):
        advantages(queue, PPOTrainerSync, config, ACCS)


@pytest.mark.e2e
@pytest.mark.parametrize("row", [row for row in ROWS if row.test == "filter"], ids=lambda row: row.what)
def test_groups_without_a_signal_are_replaced(queue, row):
    """An all-wrong group goes under every filter, a mixed one stays."""
    buffer = buffer_of(
        *row.settings, "data.train_batch_size=1", refill=lambda n: put_group(queue, "mixed", [0, 1]) or n
    )
    try:
        put_group(queue, "wrong", [0.0, 0.0])
        batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=1)
        assert {key.split("_")[0] for key in batch.keys} == {"mixed"}
        assert metrics["training/filter_groups/evicted_samples"] == 1
    finally:
        queue.kv_clear(keys=list(queue.kv_list("train").get("train", {})), partition_id="train")
