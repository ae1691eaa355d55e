# SPDX-License-Identifier: Apache-2.0
"""verl's PPO/GRPO trainers with the visual attention reward (VARS): one mixin over each of verl's V1 trainers.

Shape suffixes: B = rollouts, F = fields of VISUAL_FIELDS
"""

import logging
import os
from pathlib import Path

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import trainer_separate_async
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode, PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer

from avar_verl.model import families
from avar_verl.objectives.alarms import RiseAlarm, system_mass_alarm
from avar_verl.objectives.vars import VISUAL_FIELDS, shape_visual_reward
from avar_verl.plugin.config import MEASURE_FLAG, VISUAL_OUTPUT, AvarConfig, TrainerConfig, VarsConfig
from avar_verl.plugin.refusals import bypasses, check_grpo
from avar_verl.plugin.switch import TRAINER_NAMES, VARIABLE, is_wanted, switch_on
from avar_verl.plugin.trainer.advantage import add_to_advantages, visual_advantage
from avar_verl.plugin.trainer.dependency import choose_partners, weigh_tokens
from avar_verl.plugin.trainer.replay_buffer import configured_replay_buffer
from avar_verl.plugin.trainer.rewards import gate_if_any, reward_infos, reward_part_metrics, validation_parts
from avar_verl.plugin.trainer.rollouts import IMAGES, rollout_columns, write_images
from avar_verl.plugin.trainer.validation import ValidationSamples


def check_workers_are_on() -> None:
    """Refuse a Ray job whose workers would run stock verl.

    Raises:
        ValueError: the environment of this process, which Ray gives to the workers too, does not switch the plugin on.
    """
    if not is_wanted():
        raise ValueError(
            f"every Ray worker of an avar run is switched on by its environment; got {VARIABLE} unset. Set "
            f"ray_kwargs.ray_init.runtime_env.env_vars.{VARIABLE}='1', as avar_grpo.yaml does."
        )


def check_workers_know(family: str) -> None:
    """Refuse a Ray job whose workers would look for another family than `avar.family`.

    Raises:
        ValueError: the environment of this process, which Ray gives to the workers too, names another one.
    """
    named = os.environ.get(families.VARIABLE, "")
    if named != family:
        raise ValueError(
            f"every Ray worker finds the family of a run in its environment; got avar.family={family!r} with "
            f"{families.VARIABLE}={named!r}. A Ray that the run starts inherits it; for one that was there before, set "
            f"ray_kwargs.ray_init.runtime_env.env_vars.{families.VARIABLE} too."
        )


class VarsMixin:
    """All of VARS, over any of verl's V1 trainers: `lambda_v * r_visual` on the last response token of correct answers.

    Changes relative to verl's trainer: the old-log-prob pass also returns attention masses and visual dependency; the
    weighted visual reward is added to `rm_scores` of rollouts with a correct answer, or normalised to the advantages
    (`avar.vars.advantage`); the dependency can weigh the advantages of tokens (`avar.vars.token_weights`); which groups
    the replay buffer drops and how often it looks; `avar/*` metrics. With lambda_v = 0, rewards are verl's, and so are
    advantages without token weights.

    Masses and dependency are those of the weights that compute old_log_probs, whichever policy has written the tokens.
    With `algorithm.rollout_correction.bypass_mode` verl computes none, and one pass measures with the current weights.
    """

    VERL_MODE: str
    """The name of verl's trainer in `trainer.v1`."""

    def __init__(self, config: DictConfig):
        check_workers_are_on()
        check_workers_know(config.avar.get("family") or "")
        switch_on()
        self.vars: VarsConfig = omega_conf_to_dataclass(config.avar.vars)
        self.settings: TrainerConfig = omega_conf_to_dataclass(config.avar.trainer)
        self._rise_alarm = RiseAlarm(self.vars.alarm_window)
        self._is_measuring = False  # In validation, see _get_required_batch_multiple.
        check_grpo(config, AvarConfig(vars=self.vars, trainer=self.settings))
        super().__init__(config)

    # verl compares the configured mode with the literal "sync" in six places (trainer_base.py:153, 731, 902, 912, 1004,
    # 1499) and gives every other name an asynchronous replay buffer and checkpoints; it also names the trainer's own
    # settings (130, 157). The base class assigns the configured name, and the setter drops it.
    @property
    def trainer_mode(self) -> str:
        return self.VERL_MODE

    @trainer_mode.setter
    def trainer_mode(self, name: str) -> None:
        return

    def _build_replay_buffer(self):
        return configured_replay_buffer(super()._build_replay_buffer(), self.vars, self.settings)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch.extra_info[MEASURE_FLAG] = self.vars.measures
        if self.vars.swaps:
            choose_partners(batch)
        batch = super()._compute_old_log_prob(batch, metrics)
        if self.vars.measures and bypasses(self.config):
            self._measure(batch)
        batch.extra_info[MEASURE_FLAG] = False
        return batch

    def _measure(self, batch: KVBatchMeta) -> None:
        """One log-prob pass of the actor's current weights that writes VISUAL_OUTPUT to the TransferQueue."""
        batch.extra_info.update(calculate_entropy=False, compute_loss=False, **{MEASURE_FLAG: True})
        batch.extra_info["temperature"] = self.config.actor_rollout_ref.rollout.temperature
        self.actor_rollout_wg.compute_log_prob(batch)

    def _take_memory(self) -> None:
        """Between the rollouts of validation: the rollout engine makes room for a pass of the actor."""
        self.checkpoint_manager.sleep_replicas()

    def _return_memory(self) -> None:
        """The rollout engine goes on where `_take_memory` stopped it."""
        self.checkpoint_manager.update_weights(self.global_steps)

    def _validate(self) -> dict[str, float]:
        """verl's validation, which also logs masses and r_visual of its rollouts, by data source, and some with images.

        verl has no hook between the rollouts of a validation batch and its metrics, so the replay buffer that passes
        them on is wrapped during validation (trainer_base.py:1076).
        """
        self._samples = ValidationSamples(self.config.trainer.log_val_generations, self.tokenizer)
        looks = [self._measure_validation] if self.vars.measures else []
        buffer = self.replay_buffer
        self.replay_buffer = _WatchedBuffer(buffer, [*looks, self._samples.add])
        try:
            return super()._validate()
        finally:
            self.replay_buffer = buffer

    def _measure_validation(self, batch: KVBatchMeta) -> None:
        """Add the measurements of the log-prob pass to the reward parts of validation rollouts."""
        self._take_memory()
        measured = KVBatchMeta(keys=list(batch.keys), tags=batch.tags, partition_id=batch.partition_id)
        self._is_measuring = True
        try:
            measured = self._balance_batch(measured, metrics={})
        finally:
            self._is_measuring = False
        if self.vars.swaps:
            choose_partners(measured)
        self._measure(measured)
        self._return_memory()
        fields = ["uid", "extra_fields", VISUAL_OUTPUT]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        extra_fields = [dict(extra) for extra in data["extra_fields"]]
        visual_BF = torch.stack(list(data[VISUAL_OUTPUT].unbind())).float()
        infos = reward_infos(extra_fields)
        parts = validation_parts(visual_BF, infos, list(data["uid"]), self.vars)
        for extra, info, own in zip(extra_fields, infos, parts, strict=True):
            extra["reward_extra_info"] = {**info, **own}
        tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=tu.get_tensordict({"extra_fields": extra_fields}),
        )
        padding = sorted(set(measured.keys) - set(batch.keys))
        if padding:
            tq.kv_clear(keys=padding, partition_id=batch.partition_id)

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        """verl pads batches to whole mini-batches of the actor; a measurement needs only whole micro-batches."""
        if not self._is_measuring:
            return super()._get_required_batch_multiple(dp_size)
        rollout = self.config.actor_rollout_ref.rollout
        return dp_size * (1 if rollout.log_prob_use_dynamic_bsz else rollout.log_prob_micro_batch_size_per_gpu)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        advantage_B = self._add_visual_reward(batch, metrics)
        done = super()._compute_advantage(batch, metrics)
        if advantage_B is not None:
            add_to_advantages(batch, advantage_B)
        if self.vars.token_weights == "dependency":
            metrics.update(weigh_tokens(batch))
        return done

    def _add_visual_reward(self, batch: KVBatchMeta, metrics: dict) -> torch.Tensor | None:
        """Add the weighted r_visual to `rm_scores` in the TransferQueue and log every part of the reward.

        With `normalize_then_sum`, `rm_scores` stay as they are, and the (B,) float32 to add to the advantages returns.
        """
        fields = ["uid", "rm_scores", "extra_fields"] + ([VISUAL_OUTPUT] if self.vars.measures else [])
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        real = [not tag.get("is_padding", False) for tag in batch.tags]
        infos = reward_infos(data["extra_fields"])
        metrics.update(reward_part_metrics(infos, real))
        if not self.vars.measures:
            return None

        visual_BF = torch.stack(list(data[VISUAL_OUTPUT].unbind())).float()
        correct_B = gate_if_any(infos, real, self.vars)
        raw_B = visual_BF[:, VISUAL_FIELDS.index(self.vars.statistic)]
        if self.vars.lambda_v == 0:
            metrics.update(visual_metrics(visual_BF, correct_B, real))
            metrics.update(self._alarms(metrics))
            return None
        shaped_B = shape_visual_reward(raw_B, correct_B, list(data["uid"]), self.vars.shaping, self.vars.clip_max)
        weighted_B = self.vars.lambda_v * shaped_B
        metrics.update(visual_metrics(visual_BF, correct_B, real, raw_B, shaped_B, weighted_B))
        metrics.update(self._alarms(metrics))
        if self.vars.advantage == "normalize_then_sum":
            advantage_B = self.vars.lambda_v * visual_advantage(shaped_B, batch, list(data["uid"]))
            metrics["avar/r_visual/advantage"] = float(advantage_B[torch.tensor(real)].abs().mean())
            return advantage_B

        scores = list(data["rm_scores"].unbind())
        for score, reward in zip(scores, weighted_B, strict=True):
            if reward != 0:
                score[-1] += reward.to(score.dtype)  # Where the outcome reward is too (AgentLoopOutput.as_dict).
        rm_scores = torch.nested.as_nested_tensor(scores, layout=torch.jagged)
        tq.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict({"rm_scores": rm_scores}, batch_size=len(batch)),
        )
        return None

    def _alarms(self, metrics: dict) -> dict[str, float]:
        """`avar/alarm/*`, 1 while an alarm is on; empty without a measured rollout, none of accuracy without a gate."""
        alarms = {}
        if "avar/system_mass" in metrics:
            starved = system_mass_alarm(metrics["avar/system_mass"], self.vars.alarm_system_mass)
            alarms["avar/alarm/system_mass"] = float(starved)
        statistic = f"avar/{self.vars.statistic}"
        if statistic in metrics and "avar/correct" in metrics:
            rises = self._rise_alarm.update(metrics[statistic], metrics["avar/correct"])
            alarms["avar/alarm/rise_without_accuracy"] = float(rises)
        return alarms

    def _maybe_log_val_generations(self, inputs: list, outputs: list, scores: list) -> None:
        """verl's text of `trainer.log_val_generations` rollouts, and as many with images and parts."""
        super()._maybe_log_val_generations(inputs, outputs, scores)
        if self.config.trainer.log_val_generations:
            self._samples.log(self.config.trainer.logger, self.global_steps, self.validation_generations_logger)

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        """verl's dump of text and score, with what `rollout_columns` adds, and the prompts' images beside it."""
        with marked_timer("dump_rollout_generations", timing_raw, color="green"):
            skip_special_tokens = self.config.avar.reward.skip_special_tokens
            verls, ours, files = rollout_columns(batch, self.tokenizer, self.vars, skip_special_tokens)
            write = self._dump_executor.submit(write_images, Path(rollout_data_dir) / IMAGES, files)
            self._dump_futures.append(write)
            self._dump_generations(**verls, reward_extra_infos_dict=ours, dump_path=rollout_data_dir)


class AvarPPOTrainer(VarsMixin, PPOTrainerSync):
    """`avar_sync`: rollouts of a step are those of its prompts, written by its policy."""

    VERL_MODE = "sync"


class AvarPPOTrainerColocateAsync(VarsMixin, PPOTrainerColocateAsync):
    """`avar_colocate_async`: rollouts that are not finished go on after the update, with its weights."""

    VERL_MODE = "colocate_async"

    def _take_memory(self) -> None:
        # Rollouts for training are still being written. Going to sleep waits for them to end, so they are interrupted
        # first, as verl does before an update (trainer_colocate_async.py:44).
        self.checkpoint_manager.abort_replicas()
        super()._take_memory()

    def _return_memory(self) -> None:
        super()._return_memory()
        self.checkpoint_manager.resume_generation_replicas()


class AvarPPOTrainerSeparateAsync(VarsMixin, PPOTrainerSeparateAsync):
    """`avar_separate_async`: training and rollouts on processes of their own.

    In decoupled mode verl computes old_log_probs with the weights of the last synchronisation, for all mini-batches of
    a step (trainer_separate_async.py:187), so masses are those of these weights, too.
    """

    VERL_MODE = "separate_async"
    _was_rollout = False

    def _setup(self) -> None:
        if not self._enable_hybrid_replicas:
            # Without replicas on the training processes, verl passes its logger an argument that loggers do not have
            # (trainer_separate_async.py:181): a TypeError, unless the message is not wanted.
            trainer_separate_async.logger.setLevel(logging.WARNING)
        super()._setup()

    def _take_memory(self) -> None:
        # Only replicas on the training processes take their memory; during validation they may be writing rollouts.
        self._was_rollout = self.current_mode == HybridEngineMode.ROLLOUT
        if self._was_rollout:
            self.switch_to_trainer()

    def _return_memory(self) -> None:
        if self._was_rollout:
            self.switch_to_rollout()


# By their names in verl's registry.
TRAINERS = {
    TRAINER_NAMES[trainer.VERL_MODE]: trainer
    for trainer in (AvarPPOTrainer, AvarPPOTrainerColocateAsync, AvarPPOTrainerSeparateAsync)
}


class _WatchedBuffer:
    """A replay buffer that shows every batch to `looks`, in order, before returning it."""

    def __init__(self, buffer, looks):
        self._buffer, self._looks = buffer, looks

    def __getattr__(self, name):
        return getattr(self._buffer, name)

    def sample(self, *args, **kwargs):
        batch, metrics = self._buffer.sample(*args, **kwargs)
        for look in self._looks:
            look(batch)
        return batch, metrics


def visual_metrics(
    visual_BF: torch.Tensor,
    correct_B: torch.Tensor | None,
    real: list[bool],
    raw_B: torch.Tensor | None = None,
    shaped_B: torch.Tensor | None = None,
    weighted_B: torch.Tensor | None = None,
) -> dict[str, float]:
    """Metrics of a batch of rollouts, over the real ones.

    `avar/vas`, `avar/ratio`, `avar/image_share`, `avar/image_mass`, `avar/system_mass` of the responses, over rollouts
    where they are defined; `avar/dependency` likewise; `avar/measured_rollouts`, the number of rollouts where any of
    them is; `avar/r_visual/raw` of rollouts where the statistic is;
    `avar/r_visual/gated` after gate and shaping, `avar/r_visual/weighted` after lambda_v and, if there is a gate,
    `avar/correct`, over all.
    """
    real_B = torch.tensor(real)
    fields = dict(zip(VISUAL_FIELDS, visual_BF.unbind(1), strict=True))
    with_masses_B = real_B & torch.isfinite(fields["ratio"]) & torch.isfinite(fields["image_share"])
    with_dependency_B = real_B & torch.isfinite(fields["dependency"])
    measured_B = with_masses_B | with_dependency_B
    out = {"avar/measured_rollouts": int(measured_B.sum())}
    if correct_B is not None:
        out["avar/correct"] = float(correct_B[real_B].float().mean())
    if bool(with_masses_B.any()):
        for name in ("vas", "ratio", "image_share", "image_mass", "system_mass"):
            out[f"avar/{name}"] = float(fields[name][with_masses_B].mean())
    if bool(with_dependency_B.any()):
        out["avar/dependency"] = float(fields["dependency"][with_dependency_B].mean())
    if raw_B is not None:
        raw_B = raw_B[measured_B & torch.isfinite(raw_B)]
        if len(raw_B):
            out["avar/r_visual/raw"] = float(raw_B.mean())
    if shaped_B is not None:
        out["avar/r_visual/gated"] = float(shaped_B[real_B].mean())
        out["avar/r_visual/weighted"] = float(weighted_B[real_B].mean())
    return out
