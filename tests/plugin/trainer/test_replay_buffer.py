# SPDX-License-Identifier: Apache-2.0
"""verl's replay buffer as the trainer builds it: which groups it drops, and how often it looks."""

import inspect
import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
from verl.utils.config import omega_conf_to_dataclass

from avar_verl.plugin.refusals import check_grpo_config
from avar_verl.plugin.trainer.ppo import AvarPPOTrainer, AvarPPOTrainerColocateAsync, AvarPPOTrainerSeparateAsync
from avar_verl.plugin.trainer.replay_buffer import AllWrongFilterBuffer, AllWrongFilterBufferAsync
from tests.plugin.test_config import recipe

FILTER = ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc")
ALL_WRONG = (*FILTER, "avar.vars.drop_groups=all_wrong")


def buffer_of(*overrides: str, refill=None, trainer_cls: type = AvarPPOTrainer):
    """The trainer's replay buffer for a config of the recipe; `refill(number)` stands for new prompts."""
    trainer = object.__new__(trainer_cls)
    trainer.config = recipe("avar_grpo", "machine=cpu_grpo", *overrides)
    trainer.vars = omega_conf_to_dataclass(trainer.config.avar.vars)
    trainer.settings = omega_conf_to_dataclass(trainer.config.avar.trainer)
    check_grpo_config(trainer.config, trainer.vars)
    trainer._add_prompts_to_generate = refill
    return trainer._build_replay_buffer()


# ---- how often it looks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [(), ALL_WRONG], ids=["verl's", "all_wrong"])
@pytest.mark.parametrize("setting, interval", [(None, 0.1), ("0.5", 0.5), ("null", 2.0)])
def test_the_poll_interval_reaches_the_buffer(monkeypatch, setting, interval, drop):
    overrides = () if setting is None else (f"avar.trainer.poll_interval_s={setting}",)
    buffer = buffer_of(*overrides, *drop, refill=len)
    slept = []
    monkeypatch.setattr("verl.trainer.ppo.v1.replay_buffer.time.sleep", slept.append)
    buffer._wait_for_next_poll("train", 0.0)
    assert slept == [interval]


SAMPLERS = """
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
class Own(ReplayBuffer): pass
class Foreign:
    def __init__(self, **kwargs): pass
"""


def test_custom_samplers(tmp_path):
    path = tmp_path / "samplers.py"
    path.write_text(SAMPLERS)
    custom = [f"trainer.v1.sampler.custom_sampler.{key}" for key in ("path", "name")]
    own = buffer_of(f"{custom[0]}={path}", f"{custom[1]}=Own")
    assert type(own).__name__ == "Own" and own.poll_interval == 0.1
    foreign = (f"{custom[0]}={path}", f"{custom[1]}=Foreign")
    with pytest.raises(ValueError, match="got 0.1 for the custom sampler Foreign. Set avar.trainer.*=null"):
        buffer_of(*foreign)
    assert type(buffer_of(*foreign, "avar.trainer.poll_interval_s=null")).__name__ == "Foreign"
    with pytest.raises(ValueError, match=re.escape(f"custom_sampler.path={str(path)!r} with avar.vars.drop_groups")):
        buffer_of(*foreign, *ALL_WRONG)


# ---- which groups it drops -----------------------------------------------------------------------------------------


def test_the_filter_has_every_argument_of_verls_buffer():
    """Fails if verl stops keeping an argument as an attribute of its name."""
    cases = [
        (AvarPPOTrainer, ReplayBuffer, AllWrongFilterBuffer),
        (AvarPPOTrainerColocateAsync, ReplayBufferAsync, AllWrongFilterBufferAsync),
        (AvarPPOTrainerSeparateAsync, ReplayBufferAsync, AllWrongFilterBufferAsync),
    ]
    for trainer, stock, filtering in cases:
        verls, ours = (buffer_of(*own, refill=len, trainer_cls=trainer) for own in (FILTER, ALL_WRONG))
        assert type(verls) is stock and type(ours) is filtering
        assert ours.trainer_mode == trainer.VERL_MODE
        assert ours.trainer_config == recipe("avar_grpo", "machine=cpu_grpo").trainer.v1[trainer.VERL_MODE]
        for name in inspect.signature(ReplayBuffer).parameters:
            assert getattr(ours, name) == getattr(verls, name), name
        assert ours.filter_groups_metric == "acc" and ours.refill_fn is len
        assert ours.gen_batch_size == (1 if stock is ReplayBuffer else None)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["avar.vars.drop_groups=all_wrong"], "filter_groups.enable=False. Set it to True, with .*metric=acc"),
        ([FILTER[0], "avar.vars.drop_groups=all_wrong"], "metric='reward'. Set it to acc"),
        ([*ALL_WRONG, "avar.vars.gate_key=iou"], "metric='acc'. Set it to iou"),
        ([*ALL_WRONG, "avar.vars.gate_key=iou", "avar.vars.lambda_v=0"], "metric='acc'. Set it to iou"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    config = recipe("avar_grpo", "machine=cpu_grpo", *overrides)
    with pytest.raises(ValueError, match=message):
        check_grpo_config(config, omega_conf_to_dataclass(config.avar.vars))


def put_group(tq, uid: str, accs: list[float] | None, partition: str = "train") -> None:
    """A finished prompt and its rollouts; None: rollouts that no reward function has seen."""
    infos = [{}] * 2 if accs is None else [{"reward_extra_info": {"acc": acc}} for acc in accs]
    fields = TensorDict(
        {"x": torch.zeros(len(infos), 1), "extra_fields": NonTensorStack(*infos)}, batch_size=len(infos)
    )
    keys = [f"{uid}_{session}_0" for session in range(len(infos))]
    tq.kv_batch_put(keys=keys, partition_id=partition, fields=fields, tags=[{"status": "success"}] * len(keys))
    tag = {"is_prompt": True, "status": "finished", "global_steps": 1}
    tq.kv_batch_put(keys=[uid], partition_id=partition, tags=[tag])


GROUPS = {
    "right": [1.0, 1.0],
    "wrong": [0.0, 0.0],
    "nearly": [0.25, 0.5],  # at the threshold is wrong
    "mixed": [0.0, 1.0],
}


@pytest.mark.e2e
@pytest.mark.parametrize("drop", [(), ALL_WRONG], ids=["verl's", "all_wrong"])
def test_a_finished_group_is_taken_at_the_next_look(queue, monkeypatch, drop):
    """Through verl's `sample`: rollouts that end during the third wait are returned after it, with no other wait."""
    buffer = buffer_of(*drop, "data.train_batch_size=1", refill=len)
    slept = []

    def wait(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            put_group(queue, "late", GROUPS["mixed"])

    monkeypatch.setattr("verl.trainer.ppo.v1.replay_buffer.time.sleep", wait)
    try:
        queue.kv_batch_put(
            keys=["late"],
            partition_id="train",
            tags=[{"is_prompt": True, "status": "running", "global_steps": 1}],
        )
        batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=1)
    finally:
        for partition, keys in (queue.kv_list() or {}).items():
            if keys:
                queue.kv_clear(keys=list(keys), partition_id=partition)
    assert slept == [0.1] * 3 and sorted(batch.keys) == ["late_0_0", "late_1_0"]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "overrides, kept, evicted",
    [
        # Refill brings "mixed" (and, for verl's filter, "more"): two groups a batch
        (ALL_WRONG, {"right", "mixed"}, {0.0: 1, 0.5: 1}),
        (FILTER, {"nearly", "mixed"}, {1.0: 1, 0.0: 1}),
    ],
    ids=["all_wrong", "identical"],
)
def test_groups_are_dropped_and_replaced(queue, overrides, kept, evicted):
    """Through verl's `sample`: eviction, refill of two prompts for each, draining, clearing."""
    asked = []

    def refill(number: int) -> int:
        asked.append(number)
        put_group(queue, "mixed", GROUPS["mixed"])
        return number

    buffer = buffer_of(*overrides, "data.train_batch_size=2", refill=refill)
    try:
        for uid in ("right", "wrong", "nearly"):
            put_group(queue, uid, GROUPS[uid])
        batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=2)
        assert {key.split("_")[0] for key in batch.keys} == kept and len(batch.keys) == 4
        assert metrics["training/filter_groups/evicted_samples"] == 2
        assert metrics["_dapo_filtered_reward_counts"] == evicted
        assert asked == [2], "two groups in flight at most, and enough after the first refill"
        left = queue.kv_list("train")["train"]
        assert set(left) == set(batch.keys), "dropped groups leave the queue"
    finally:
        queue.kv_clear(keys=list(queue.kv_list("train").get("train", {})), partition_id="train")


@pytest.mark.e2e
def test_an_asynchronous_trainer_drops_and_replaces_groups_too(queue):
    """One for one, and what is not taken stays in the queue."""
    asked = []

    def refill(number: int) -> int:
        asked.append(number)
        put_group(queue, "mixed", GROUPS["mixed"])
        return number

    buffer = buffer_of(*ALL_WRONG, refill=refill, trainer_cls=AvarPPOTrainerColocateAsync)
    try:
        for uid in ("right", "wrong"):
            put_group(queue, uid, GROUPS[uid])
        batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=1)
        assert {key.split("_")[0] for key in batch.keys} <= {"right", "mixed"} and len(batch.keys) == 2
        assert metrics["training/filter_groups/evicted_samples"] == 1 and asked == [1]
        assert len(queue.kv_list("train")["train"]) == 5, "the batch, and the other group with its prompt"
    finally:
        queue.kv_clear(keys=list(queue.kv_list("train").get("train", {})), partition_id="train")


@pytest.mark.e2e
def test_validation_and_groups_that_nobody_has_marked(queue):
    buffer = buffer_of(*ALL_WRONG, "data.train_batch_size=1", refill=len)
    put_group(queue, "wrong", [0.0, 0.0], "val")
    batch, metrics = buffer.sample(global_steps=1, partition_id="val", batch_size=1)
    assert len(batch.keys) == 2 and metrics == {}
    queue.kv_clear(keys=batch.keys, partition_id="val")
    put_group(queue, "nobody", None)
    try:
        with pytest.raises(ValueError, match="'acc' marks; no reward function was called"):
            buffer.sample(global_steps=1, partition_id="train", batch_size=1)
    finally:
        queue.kv_clear(keys=list(queue.kv_list("train")["train"]), partition_id="train")
