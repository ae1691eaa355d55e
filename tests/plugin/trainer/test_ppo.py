# SPDX-License-Identifier: Apache-2.0
"""The trainer's arithmetic, and r_visual through a real TransferQueue."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu

from avar_verl.objectives.alarms import RiseAlarm
from avar_verl.objectives.vars import VISUAL_FIELDS
from avar_verl.plugin.config import (
    DEPENDENCY_OUTPUT,
    MEASURE_FLAG,
    PARTITION,
    PARTNER,
    PROMPT_ROWS,
    VISUAL_OUTPUT,
    VarsConfig,
)
from avar_verl.plugin.engine.inputs import partner_features
from avar_verl.plugin.refusals import check_grpo_config
from avar_verl.plugin.switch import TRAINER_NAMES
from avar_verl.plugin.trainer.dependency import choose_partners, weigh_tokens
from avar_verl.plugin.trainer.ppo import (
    TRAINERS,
    AvarPPOTrainer,
    AvarPPOTrainerSeparateAsync,
    VarsMixin,
    validation_parts,
    visual_metrics,
)
from avar_verl.plugin.trainer.rewards import correct_answers, gate_if_any, reward_infos, reward_part_metrics

# ---- the gate ------------------------------------------------------------------------------------------------------


def test_gate():
    """Right is above the threshold, not at it; padding never is right."""
    infos = [{"acc": 1.0}, {"acc": 0.5}, {"acc": True}, {"acc": np.float64(0.51)}, {"acc": math.nan}, {"acc": 1}]
    correct = correct_answers(infos, [True] * 5 + [False], VarsConfig())
    assert correct.tolist() == [True, False, True, True, False, False] and correct.dtype == torch.bool
    other = VarsConfig(gate_key="score", gate_threshold=0.2)
    assert correct_answers([{"score": 0.3, "acc": 0}, {"score": 0.2}], [True, True], other).tolist() == [True, False]


def test_a_reward_function_without_the_gate_is_an_error():
    with pytest.raises(ValueError, match=r"'acc' marks; it returned \['score'\].*gate_key"):
        correct_answers([{"acc": 1.0}, {"score": 1.0}], [True, True], VarsConfig())
    assert correct_answers([{"acc": 1.0}, {}], [True, False], VarsConfig()).tolist() == [True, False]  # padding


def test_rollouts_that_no_reward_function_has_seen():
    """A colocated reward model and loops with a score of their own: no dict, or none yet."""
    infos = reward_infos([{}, {"reward_extra_info": None}, {"reward_extra_info": {}, "turns": 2}])
    assert infos == [{}, {}, {}] and reward_infos([{"reward_extra_info": {"acc": 1}}]) == [{"acc": 1}]
    real = [True] * 3
    assert reward_part_metrics(infos, real) == {}
    for unpaid in (VarsConfig(lambda_v=0), VarsConfig(lambda_v=0, measure=True)):
        assert gate_if_any(infos, real, unpaid) is None
    with pytest.raises(ValueError, match=r"no reward function was called.*need avar.vars.lambda_v=0"):
        gate_if_any(infos, real, VarsConfig())
    one_without = [*infos[:2], {"acc": 1.0}]
    with pytest.raises(ValueError, match="no reward function was called"):
        gate_if_any(one_without, real, VarsConfig(lambda_v=0, measure=True))
    metrics = visual_metrics(rows(2.0, 4.0, 6.0), None, real)
    assert metrics["avar/ratio"] == 4 and "avar/correct" not in metrics
    alarms = trainer_with(VarsConfig(lambda_v=0, measure=True))._alarms(metrics)
    assert alarms == {"avar/alarm/system_mass": 0.0}
    parts = validation_parts(rows(2.0, 4.0, 6.0), infos, list("aab"), VarsConfig(lambda_v=0, measure=True))
    assert parts[1] == {"vas": 0.5, "ratio": 4.0, "image_share": 0.5, "r_visual_raw": 4.0}


def test_a_flag_for_every_rollout():
    for function in (
        lambda: correct_answers([{"acc": 1}], [True] * 2, VarsConfig()),
        lambda: reward_part_metrics([], [True]),
    ):
        with pytest.raises(ValueError, match="zip"):
            function()


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_parts_are_means_over_real_rollouts_and_words_are_left_out():
    infos = [
        {"acc": 1.0, "ok": True, "why": "x"},
        {"acc": 0.0, "ok": np.bool_(0), "why": "y"},
        {"acc": 9.0, "why": "z"},
    ]
    assert reward_part_metrics(infos, [True, True, False]) == {"avar/reward/acc": 0.5, "avar/reward/ok": 0.5}
    assert reward_part_metrics(infos, [False] * 3) == reward_part_metrics([], []) == {}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_parts_of_data_sources_that_return_different_ones(order):
    """Each part is averaged over the rollouts that have it, whichever comes first."""
    infos = [{"acc": 1.0, "iou": 0.5, "note": "x"}, {"acc": 0.0, "f1": 0.25, "iou": "none"}, {"acc": 0.5, "iou": 0.0}]
    got = reward_part_metrics([infos[i] for i in order], [True] * 3)
    assert got == {"avar/reward/acc": 0.5, "avar/reward/iou": 0.25, "avar/reward/f1": 0.25}


def rows(*ratios: float, dependency: float = math.nan) -> torch.Tensor:
    """(B, F) with the given ratio and dependency (nan: not measured), the other fields 0.5."""
    out = torch.full((len(ratios), len(VISUAL_FIELDS)), 0.5)
    out[:, 0] = torch.tensor(ratios)
    out[:, VISUAL_FIELDS.index("dependency")] = dependency
    return out


def test_metrics_leave_out_padding_and_what_is_not_defined():
    """Rollouts: 2, 4, not defined, padding. Measured 2 and 4; paid 2, 0, 0 over the three real ones."""
    visual = rows(2.0, 4.0, math.nan, 100.0)
    correct = torch.tensor([True, False, False, False])
    shaped = torch.tensor([2.0, 0, 0, 0])
    out = visual_metrics(visual, correct, [True, True, True, False], visual[:, 0], shaped, 0.3 * shaped)
    assert out["avar/measured_rollouts"] == 2 and out["avar/ratio"] == 3 and out["avar/r_visual/raw"] == 3
    assert out["avar/correct"] == pytest.approx(1 / 3)
    assert out["avar/r_visual/gated"] == pytest.approx(2 / 3)
    assert out["avar/r_visual/weighted"] == pytest.approx(0.2)


def test_every_metric_is_its_own_field():
    visual = torch.tensor([[7.0, 0.9, 0.4, 0.05, 11.0, 10, 16, 8, 0.5], [5.0, 0.7, 0.2, 0.15, 8.0, 20, 16, 8, -0.1]])
    out = visual_metrics(visual, torch.tensor([True, True]), [True, True])
    expected = {"vas": 9.5, "ratio": 6.0, "image_share": 0.8, "image_mass": 0.3, "system_mass": 0.1, "dependency": 0.2}
    assert {key: out[f"avar/{key}"] for key in expected} == pytest.approx(expected)
    assert not any(key.startswith("avar/r_visual") for key in out)  # nothing is paid, nothing is logged as paid


@pytest.mark.parametrize("field", ["ratio", "image_share"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_field_that_is_not_finite_leaves_the_rollout_out(field, value):
    visual = rows(2.0, 4.0)
    visual[1, VISUAL_FIELDS.index(field)] = value
    out = visual_metrics(visual, torch.tensor([False, False]), [True, True])
    assert out["avar/measured_rollouts"] == 1 and out["avar/ratio"] == 2


def test_nothing_measured():
    out = visual_metrics(rows(math.nan), torch.tensor([False]), [True], torch.tensor([math.nan]))
    assert out == {"avar/measured_rollouts": 0, "avar/correct": 0.0}


def test_a_dependency_without_masses():
    """Dependencies 1, -0.5, not defined (no response), padding 9: their mean is 0.25, and nothing is said of masses."""
    visual = torch.full((4, len(VISUAL_FIELDS)), math.nan)
    dependency = torch.tensor([1.0, -0.5, math.nan, 9.0])
    visual[:, -1] = dependency
    paid = torch.tensor([1.0, 0.0, 0.0, 0.0])
    out = visual_metrics(visual, torch.tensor([True] + [False] * 3), [True] * 3 + [False], dependency, paid, 0.3 * paid)
    assert out == pytest.approx(
        {
            "avar/measured_rollouts": 2,
            "avar/correct": 1 / 3,
            "avar/dependency": 0.25,
            "avar/r_visual/raw": 0.25,
            "avar/r_visual/gated": 1 / 3,
            "avar/r_visual/weighted": 0.1,
        }
    )


def test_a_rollout_without_a_system_turn_has_a_dependency():
    visual = rows(2.0, math.nan, dependency=0.5)
    out = visual_metrics(visual, None, [True, True], visual[:, 0])
    assert out["avar/measured_rollouts"] == 2 and out["avar/dependency"] == 0.5
    assert out["avar/ratio"] == out["avar/r_visual/raw"] == 2.0


# ---- configs that cannot be right ----------------------------------------------------------------------------------


def grpo_config(**algorithm):
    fsdp_config = {"vars": {"lambda_v": 0.3}}
    return OmegaConf.create(
        {"actor_rollout_ref": {"actor": {"fsdp_config": fsdp_config}}, "algorithm": dict(algorithm)}
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"rollout_correction": None, "filter_groups": None},
        {"rollout_correction": {"bypass_mode": True}},
        {"filter_groups": {"enable": False, "metric": "reward"}},
        {"filter_groups": {"enable": True, "metric": "acc"}},
    ],
)
def test_configs_that_can_be_right(algorithm):
    check_grpo_config(grpo_config(**algorithm), VarsConfig())


def without_engine_config(**changes):
    config = grpo_config()
    config.actor_rollout_ref.actor.fsdp_config = changes
    return config


@pytest.mark.parametrize(
    "config, message",
    [
        (without_engine_config(), r"fsdp_config.vars=null. Start from avar_grpo.yaml"),
        (without_engine_config(vars=None), r"fsdp_config.vars=null. Start from avar_grpo.yaml"),
        (
            grpo_config(filter_groups={"enable": True, "metric": "reward"}),
            r"lambda_v=0.3. Filter on the gate: .*metric=acc",
        ),
    ],
)
def test_configs_that_cannot_be_right_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_grpo_config(config, VarsConfig())
    check_grpo_config(config, VarsConfig(lambda_v=0))  # nothing is measured


def test_filtering_on_the_reward_is_right_where_nothing_is_added_to_it():
    config = grpo_config(filter_groups={"enable": True, "metric": "reward"})
    check_grpo_config(config, VarsConfig(lambda_v=0, measure=True))
    with pytest.raises(ValueError, match="VARS is measured"):
        check_grpo_config(without_engine_config(), VarsConfig(lambda_v=0, measure=True))


# ---- the trainer's own methods -------------------------------------------------------------------------------------


def trainer_with(vars_config: VarsConfig, cls: type = AvarPPOTrainer, **algorithm):
    trainer = object.__new__(cls)
    trainer.vars = vars_config
    trainer.config = grpo_config(**algorithm)
    trainer._rise_alarm = RiseAlarm(vars_config.alarm_window)
    return trainer


def test_alarms_watch_the_statistic_that_is_paid_for():
    """The share rises and the accuracy falls, while the ratio stands still; the system mass is under its floor."""
    steps = [
        {"avar/ratio": 9.0, "avar/image_share": share, "avar/system_mass": 0.002, "avar/correct": correct}
        for share, correct in ((0.4, 0.5), (0.6, 0.4))
    ]
    for statistic, rings in (("image_share", 1.0), ("ratio", 0.0)):
        trainer = trainer_with(VarsConfig(statistic=statistic, alarm_window=2))
        first, second = (trainer._alarms(step) for step in steps)
        assert first == {"avar/alarm/system_mass": 1.0, "avar/alarm/rise_without_accuracy": 0.0}
        assert second["avar/alarm/rise_without_accuracy"] == rings
    assert trainer._alarms({}) == {}  # no rollout was measured


def test_alarms_of_a_dependency_below_zero():
    """From -0.5 to -0.4 is a rise; without masses there is no alarm about them."""
    trainer = trainer_with(VarsConfig(statistic="dependency", alarm_window=2))
    steps = [{"avar/dependency": value, "avar/correct": 0.5} for value in (-0.5, -0.4, -0.42)]
    alarms = [trainer._alarms(step) for step in steps]
    assert [list(alarm) for alarm in alarms] == [["avar/alarm/rise_without_accuracy"]] * 3
    assert [alarm["avar/alarm/rise_without_accuracy"] for alarm in alarms] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("mode", TRAINER_NAMES)
def test_a_trainer_has_the_mode_of_verls_whatever_its_name(mode):
    cls = TRAINERS[TRAINER_NAMES[mode]]
    trainer = trainer_with(VarsConfig(), cls)
    trainer.trainer_mode = TRAINER_NAMES[mode]  # verl's base class assigns the configured name
    assert trainer.trainer_mode == mode
    assert cls.__mro__[1] is VarsMixin and cls.__mro__[2] is get_trainer_cls(mode)
    assert get_trainer_cls(TRAINER_NAMES[mode]) is cls


@pytest.mark.parametrize("vars_config", [VarsConfig(), VarsConfig(lambda_v=0), VarsConfig(lambda_v=0, measure=True)])
@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("mode", TRAINER_NAMES)
def test_masses_are_asked_for_in_one_pass(monkeypatch, mode, bypass, vars_config):
    """In the pass that computes old_log_probs; where verl takes the rollouts' own, in one of ours."""
    passes = []

    def old_log_prob(self, batch, metrics):
        if not bypass:
            passes.append(batch.extra_info[MEASURE_FLAG])
        return batch

    class Actor:
        def compute_log_prob(self, batch):
            assert batch.extra_info["compute_loss"] is batch.extra_info["calculate_entropy"] is False
            passes.append((batch.extra_info[MEASURE_FLAG], batch.extra_info["temperature"]))

    monkeypatch.setattr(get_trainer_cls(mode), "_compute_old_log_prob", old_log_prob)
    correction = {"rollout_correction": {"bypass_mode": bypass}}
    trainer = trainer_with(vars_config, TRAINERS[TRAINER_NAMES[mode]], **correction)
    trainer.actor_rollout_wg = Actor()
    trainer.config.actor_rollout_ref.rollout = {"temperature": 0.7}
    batch = trainer._compute_old_log_prob(SimpleNamespace(extra_info={}), {})
    expected = [vars_config.measures] if not bypass else [(True, 0.7)] if vars_config.measures else []
    assert passes == expected and batch.extra_info[MEASURE_FLAG] is False


class Replicas:
    """Writes down what a checkpoint manager is told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.told.append((name, *args, *kwargs.items()))


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_measuring_validation_stops_the_rollout_engine_as_an_update_does(mode):
    """What our trainer tells the replicas is what verl's tells them before and after an update."""
    measured, updated = (trainer_with(VarsConfig(), TRAINERS[TRAINER_NAMES[mode]]) for _ in range(2))
    for trainer in (measured, updated):
        trainer.checkpoint_manager, trainer.global_steps = Replicas(), 3
        trainer.curr_step_profile, trainer.timing_raw = False, {}
    measured._take_memory(), measured._return_memory()
    updated.on_sample_end(), updated.on_step_end()
    told = measured.checkpoint_manager.told
    assert told == updated.checkpoint_manager.told and ("update_weights", 3) in told
    assert (("abort_replicas",) in told) == (mode == "colocate_async")


@pytest.mark.parametrize("is_rollout", [False, True])
def test_separate_replicas_go_on_while_validation_is_measured(monkeypatch, is_rollout):
    trainer = trainer_with(VarsConfig(), AvarPPOTrainerSeparateAsync)
    trainer.current_mode = HybridEngineMode.ROLLOUT if is_rollout else HybridEngineMode.TRAINER
    trainer.checkpoint_manager = Replicas()
    switched = []
    for name in ("switch_to_trainer", "switch_to_rollout"):
        monkeypatch.setattr(trainer, name, lambda name=name: switched.append(name))
    trainer._take_memory(), trainer._return_memory()
    assert switched == (["switch_to_trainer", "switch_to_rollout"] if is_rollout else [])
    assert trainer.checkpoint_manager.told == []


def test_the_reward_comes_before_the_advantage(monkeypatch):
    order = []
    monkeypatch.setattr(AvarPPOTrainer, "_add_visual_reward", lambda self, batch, metrics: order.append("reward"))
    monkeypatch.setattr(PPOTrainerSync, "_compute_advantage", lambda self, batch, metrics: order.append("advantage"))
    trainer_with(VarsConfig())._compute_advantage(None, {})
    assert order == ["reward", "advantage"]


# ---- agent loop ----------------------------------------------------------------------------------------------------


def test_parts_of_validation_rollouts():
    """Two right answers, one of them without a system turn, and a wrong one."""
    visual = torch.zeros(3, len(VISUAL_FIELDS))
    visual[:, VISUAL_FIELDS.index("ratio")] = torch.tensor([4.0, float("nan"), 2.0])
    visual[:, VISUAL_FIELDS.index("image_share")] = torch.tensor([0.75, float("nan"), 0.5])
    visual[:, VISUAL_FIELDS.index("vas")] = torch.tensor([6.0, float("nan"), float("inf")])
    infos = [{"acc": 1.0}, {"acc": 1.0}, {"acc": 0.0}]
    first, second, third = validation_parts(visual, infos, ["a", "a", "b"], VarsConfig(lambda_v=0.5))
    assert first == {
        "vas": 6.0,
        "ratio": 4.0,
        "image_share": 0.75,
        "r_visual_raw": 4.0,
        "r_visual_gated": 4.0,
        "r_visual_weighted": 2.0,
    }
    assert second["vas"] is None and second["r_visual_raw"] is None and second["r_visual_weighted"] == 0
    assert third["vas"] is None and third["r_visual_raw"] == 2.0 and third["r_visual_gated"] == 0


def test_parts_of_validation_rollouts_are_those_that_are_measured():
    from avar_verl.plugin.trainer.ppo import validation_parts

    visual = torch.full((2, len(VISUAL_FIELDS)), math.nan)
    visual[:, -1] = torch.tensor([-0.5, 2.0])
    infos = [{"acc": 1.0}, {"acc": 0.0}]
    parts = validation_parts(visual, infos, ["a", "b"], VarsConfig(statistic="dependency", lambda_v=0.5))
    assert parts == [
        {"dependency": -0.5, "r_visual_raw": -0.5, "r_visual_gated": -0.5, "r_visual_weighted": -0.25},
        {"dependency": 2.0, "r_visual_raw": 2.0, "r_visual_gated": 0.0, "r_visual_weighted": 0.0},
    ]
    only_logged = VarsConfig(lambda_v=0, measure_dependency=True)
    assert validation_parts(visual, infos, ["a", "b"], only_logged) == [{"dependency": -0.5}, {"dependency": 2.0}]


def test_placeholders_are_forbidden_and_other_biases_stay():
    from avar_verl.plugin.rollout.agent_loop import forbid

    given = {"temperature": 1.0, "logit_bias": {7: 2.0}}
    assert forbid(given, [3, 4])["logit_bias"] == {7: 2.0, 3: -100.0, 4: -100.0}
    assert given == {"temperature": 1.0, "logit_bias": {7: 2.0}} and forbid({}, [3])["logit_bias"] == {3: -100.0}


# ---- r_visual through a TransferQueue ------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize(
    "vars_config, expected",
    [
        # rows: right, wrong, right (1 token), padding; raw 2, 4, 8, 100; outcome rewards 1.1, 0.1, 1, 0
        (VarsConfig(), [[0, 0, 1.1 + 0.3 * 2], [0, 0.1], [1.0 + 0.3 * 8], [0.0]]),
        (VarsConfig(shaping="clip", clip_max=3.0), [[0, 0, 1.1 + 0.6], [0, 0.1], [1.0 + 0.9], [0.0]]),
        (VarsConfig(lambda_v=0.0, measure=True), [[0, 0, 1.1], [0, 0.1], [1.0], [0.0]]),
        (VarsConfig(lambda_v=0.0), [[0, 0, 1.1], [0, 0.1], [1.0], [0.0]]),
        # the dependency of every row is -0.5: a right answer loses
        (VarsConfig(statistic="dependency"), [[0, 0, 1.1 - 0.15], [0, 0.1], [1.0 - 0.15], [0.0]]),
    ],
    ids=["paper", "clip", "lambda 0 measured", "lambda 0", "dependency"],
)
def test_r_visual_lands_on_the_last_token_of_right_answers(queue, vars_config, expected):
    from tensordict import TensorDict
    from tensordict.tensorclass import NonTensorStack

    keys = [f"uid_{i}_0" for i in range(4)]
    scores = [torch.tensor(s) for s in ([0, 0, 1.1], [0, 0.1], [1.0], [0.0])]
    infos = [{"reward_extra_info": {"acc": acc, "format": 1.0}} for acc in (1.0, 0.0, 1.0, 1.0)]
    fields = TensorDict(
        {
            "uid": NonTensorStack("a", "a", "b", "b"),
            "rm_scores": torch.nested.as_nested_tensor(scores, layout=torch.jagged),
            "extra_fields": NonTensorStack(*infos),
            VISUAL_OUTPUT: rows(2.0, 4.0, 8.0, 100.0, dependency=-0.5),
        },
        batch_size=4,
    )
    tags = [{"is_padding": i == 3} for i in range(4)]
    batch = queue.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    batch.tags = tags
    trainer = trainer_with(vars_config)
    metrics: dict = {}
    trainer._add_visual_reward(batch, metrics)
    got = queue.kv_batch_get(keys=keys, partition_id="train", select_fields=["rm_scores"])["rm_scores"].unbind()
    exact = vars_config.lambda_v == 0
    for row, value in zip(got, expected, strict=True):
        torch.testing.assert_close(row, torch.tensor(value), **(dict(rtol=0, atol=0) if exact else {}))
    assert metrics["avar/reward/acc"] == pytest.approx(2 / 3) and metrics["avar/reward/format"] == 1
    assert ("avar/vas" in metrics) == vars_config.measures
    assert ("avar/r_visual/weighted" in metrics) == (vars_config.lambda_v > 0)
    queue.kv_clear(keys=keys, partition_id="train")


@pytest.mark.e2e
def test_rollouts_without_a_reward_functions_dict(queue):
    """As verl stores them beside a colocated reward model: a score, no dict."""
    from tensordict import TensorDict
    from tensordict.tensorclass import NonTensorStack

    fields = TensorDict(
        {
            "uid": NonTensorStack("a", "a"),
            "rm_scores": torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "extra_fields": NonTensorStack({}, {"turns": 1}),
            VISUAL_OUTPUT: rows(2.0, 4.0),
        },
        batch_size=2,
    )
    batch = queue.kv_batch_put(keys=["u_0_0", "u_1_0"], partition_id="train", fields=fields, tags=[{}, {}])
    for unpaid in (VarsConfig(lambda_v=0), VarsConfig(lambda_v=0, measure=True)):
        metrics: dict = {}
        trainer_with(unpaid)._add_visual_reward(batch, metrics)
        assert metrics.get("avar/ratio") == (3.0 if unpaid.measure else None)
    with pytest.raises(ValueError, match="no reward function was called"):
        trainer_with(VarsConfig())._add_visual_reward(batch, {})
    queue.kv_clear(keys=batch.keys, partition_id="train")


@pytest.mark.e2e
def test_advantages_are_weighted_by_token(queue):
    """Dependencies 3, -2, 1, 0 over their mean of 1; none above 0; 4 and the other token masked; padding.

    Verl's log-probabilities of a sample are those of the next token: the last one belongs to no token of the sample.
    """
    from tensordict import TensorDict

    def nested(*rows):
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    keys = [f"weights_{i}_0" for i in range(4)]
    fields = TensorDict(
        {
            "advantages": nested([2.0, 2.0, 2.0, 2.0], [-1.0, -1.0], [0.5, 0.5], [0.0]),
            "response_mask": nested([1, 1, 1, 1], [1, 1], [0, 1], [0]),
            # two tokens of the prompt, which have one log-probability before the response's, and the last one
            DEPENDENCY_OUTPUT: nested(
                [5.0, 3.0, -2.0, 1.0, 0.0, 5.0], [5.0, -1.0, 0.0, 5.0], [5.0, 2.0, 4.0, 5.0], [5.0, 1.0, 5.0]
            ),
        },
        batch_size=4,
    )
    batch = queue.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=[{}] * 4)
    metrics = weigh_tokens(batch)
    got = queue.kv_batch_get(keys=keys, partition_id="train", select_fields=["advantages"])["advantages"].unbind()
    expected = [[6.0, 0.0, 2.0, 0.0], [-1.0, -1.0], [0.0, 0.5], [0.0]]
    assert [row.tolist() for row in got] == expected
    assert metrics == {"avar/token_weights/zero": 2 / 7}
    queue.kv_clear(keys=keys, partition_id="train")


@pytest.mark.e2e
def test_the_partner_of_a_prompt_depends_on_the_images_alone(queue):
    """Three prompts with images, one of them twice, one without: rollouts of one prompt share a partner."""
    from tensordict import TensorDict
    from tensordict.tensorclass import NonTensorStack

    def rollouts(order: list[str]) -> dict[str, dict]:
        pixels = {"a": 1.0, "b": 2.0, "c": 3.0}
        features = {uid: {"pixel_values": torch.full((2, 3), value)} for uid, value in pixels.items()}
        keys = [f"{uid}_{number}_0" for number, uid in enumerate(order)]
        images = [features.get(uid, {}) for uid in order]
        extra_fields = [{}] * len(order)
        if "b" in order:  # A tool returned an image, too: it is neither swapped nor handed out.
            at = order.index("b")
            images[at] = {"pixel_values": torch.cat([images[at]["pixel_values"], torch.full((5, 3), 9.0)])}
            extra_fields[at] = {PROMPT_ROWS: {"pixel_values": 2}}
        fields = TensorDict(
            {
                "uid": NonTensorStack(*order),
                "multi_modal_inputs": NonTensorStack(*images),
                "extra_fields": NonTensorStack(*extra_fields),
            },
            batch_size=len(order),
        )
        batch = queue.kv_batch_put(keys=keys, partition_id="swap", fields=fields, tags=[{}] * len(order))
        choose_partners(batch)
        assert batch.extra_info[PARTITION] == "swap"
        data = queue.kv_batch_get(keys=keys, partition_id="swap", select_fields=[PARTNER, "multi_modal_inputs"])
        data = tu.get_tensordict({PARTNER: list(data[PARTNER])}, non_tensor_dict=batch.extra_info)
        found = partner_features(data)
        queue.kv_clear(keys=keys, partition_id="swap")
        return {uid: found[key] for uid, key in zip(order, tu.get(data, PARTNER), strict=True)}

    first = rollouts(["a", "a", "b", "c", "text"])
    second = rollouts(["c", "text", "b", "a", "a"])
    assert first["text"] == second["text"] == {}
    assert all(first[uid]["pixel_values"].shape == (2, 3) for uid in "abc")
    values = {uid: first[uid]["pixel_values"][0, 0].item() for uid in "abc"}
    assert values == {uid: second[uid]["pixel_values"][0, 0].item() for uid in "abc"}
    assert sorted(values.values()) == [1.0, 2.0, 3.0]
    assert not any(values[uid] == own for uid, own in (("a", 1.0), ("b", 2.0), ("c", 3.0)))
    assert rollouts(["text", "text"]) == {"text": {}}
    with pytest.raises(
        ValueError, match="got only one of the shapes .* among 2 prompts. Set avar.vars.corruption=blank"
    ):
        rollouts(["a", "text"])
