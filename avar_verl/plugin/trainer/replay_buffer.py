# SPDX-License-Identifier: Apache-2.0
"""verl's replay buffer, told which groups to drop and how often to look."""

import inspect
from collections import Counter

import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from avar_verl.plugin.config import TrainerConfig, VarsConfig
from avar_verl.plugin.trainer.rewards import correct_answers, reward_infos


def configured_replay_buffer(buffer, vars_config: VarsConfig, trainer_config: TrainerConfig):
    """The buffer that verl has built from its own config, with the settings that verl's config does not have.

    Raises:
        ValueError: a poll interval for a custom sampler that is no `ReplayBuffer` and would not read it.
    """
    if vars_config.drop_groups == "all_wrong":
        is_async = isinstance(buffer, ReplayBufferAsync)
        buffer = (AllWrongFilterBufferAsync if is_async else AllWrongFilterBuffer)(buffer, vars_config)
    interval = trainer_config.poll_interval_s
    if interval is None:
        return buffer
    if not isinstance(buffer, ReplayBuffer):
        raise ValueError(
            f"poll_interval_s is read by verl's ReplayBuffer and its subclasses; got {interval} for the custom sampler "
            f"{type(buffer).__qualname__}. Set avar.trainer.poll_interval_s=null."
        )
    buffer.poll_interval = interval
    return buffer


class _AllWrongFilter:
    """A filter that evicts groups without a right answer, and no others.

    verl's own filter (DAPO) evicts every group whose metric is the same in all rollouts, all-right groups too, in which
    r_visual is the only signal. Eviction, refill, the bound on prompts in flight and the metrics are verl's.
    """

    def __init__(self, buffer: ReplayBuffer, vars_config: VarsConfig):
        """`buffer` is what verl has built; every argument of its constructor is an attribute of the same name."""
        super().__init__(**{name: getattr(buffer, name) for name in inspect.signature(ReplayBuffer).parameters})
        self.vars = vars_config

    def _dapo_filtered_keys(self, partition_id: str) -> tuple[set[str], Counter]:
        """Finished groups to evict, and how often each largest gate value of such a group occurs.

        A finished group does not change, so it is classified once (replay_buffer.py:190). Groups in which a rollout
        failed are not finished for verl's filter either.
        """
        if partition_id == "val":
            return set(), Counter()
        finished = self.finished_keys[partition_id]
        cache = self._dapo_classification_cache[partition_id]
        for uid in cache.keys() - finished:
            del cache[uid]
        new = finished - cache.keys()
        keys = [key for key in self.partitions[partition_id] if key.split("_")[0] in new]
        if keys:
            data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["extra_fields"])
            infos = reward_infos(data["extra_fields"])
            right = correct_answers(infos, [True] * len(infos), self.vars).tolist()
            values: dict[str, list[float]] = {}
            solved = set()
            for key, info, is_right in zip(keys, infos, right, strict=True):
                uid = key.split("_")[0]
                values.setdefault(uid, []).append(float(info[self.vars.gate_key]))
                if is_right:
                    solved.add(uid)
            cache.update({uid: None if uid in solved else max(own) for uid, own in values.items()})
        wrong = {uid: value for uid, value in cache.items() if value is not None}
        return set(wrong), Counter(wrong.values())


class AllWrongFilterBuffer(_AllWrongFilter, ReplayBuffer):
    """verl's buffer of the synchronous trainer with this filter."""


class AllWrongFilterBufferAsync(_AllWrongFilter, ReplayBufferAsync):
    """verl's buffer of the asynchronous trainers with this filter."""
