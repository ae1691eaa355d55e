# SPDX-License-Identifier: Apache-2.0
"""Advantages by hand, through the trainer's own `_compute_advantage` and a real TransferQueue.

Three right answers to prompt a, with ratios 1, 2 and 6: mean 3, distances -2, -1, 3, standard deviation sqrt(7). To
prompt b one right answer, ratio 4, and one wrong answer, ratio 9: r_visual is 4 and 0, the standard deviation that of
+-2. A row of padding. All right answers get 1.1, wrong ones 0.1.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from transfer_queue import KVBatchMeta
from verl.trainer.ppo import core_algos
from verl.utils.config import omega_conf_to_dataclass

from avar_verl.objectives.alarms import RiseAlarm
from avar_verl.objectives.groups import group_index, group_normalize
from avar_verl.objectives.vars import VISUAL_FIELDS
from avar_verl.plugin.config import VISUAL_OUTPUT
from avar_verl.plugin.refusals import ESTIMATORS, check_grpo_config
from avar_verl.plugin.trainer.advantage import visual_advantage
from avar_verl.plugin.trainer.ppo import AvarPPOTrainer
from tests.plugin.test_config import recipe

MASKS = [[1, 1], [1, 0, 0, 1], [1, 1, 1], [1], [1, 1], [0]]  # the second response has two tokens of a tool
RATIOS = [1.0, 2.0, 6.0, 4.0, 9.0, 5.0]
ACCS = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0]
UIDS = ["a", "a", "a", "b", "b", "pad"]
KEYS = ["a_0_0", "a_1_0", "a_2_0", "b_0_0", "b_1_0", "pad_0_0"]
A, B = torch.tensor([-2.0, -1.0, 3.0]), torch.tensor([1.0, -1.0])


def trainer_of(*overrides: str) -> AvarPPOTrainer:
    trainer = object.__new__(AvarPPOTrainer)
    trainer.config = recipe("avar_grpo", "machine=cpu_grpo", *overrides)
    trainer.vars = omega_conf_to_dataclass(trainer.config.avar.vars)
    trainer._rise_alarm = RiseAlarm(0)
    check_grpo_config(trainer.config, trainer.vars)
    return trainer


def advantages(queue, *overrides: str, keys=KEYS, ratios=RATIOS, accs=ACCS, uids=UIDS, **more):
    """(advantages of every row, metrics, the rewards that are logged as verl's scores)."""
    scores = [torch.tensor([*[0.0] * (len(mask) - 1), 0.1 + acc]) for mask, acc in zip(MASKS, accs, strict=True)]
    scores[-1] = torch.zeros(1)
    visual = torch.full((len(keys), len(VISUAL_FIELDS)), 0.5)
    visual[:, VISUAL_FIELDS.index("ratio")] = torch.tensor(ratios)
    fields = {
        "uid": NonTensorStack(*uids),
        "response_mask": torch.nested.as_nested_tensor([torch.tensor(mask) for mask in MASKS], layout=torch.jagged),
        "rm_scores": torch.nested.as_nested_tensor(scores, layout=torch.jagged),
        "extra_fields": NonTensorStack(*({"reward_extra_info": {"acc": acc}} for acc in accs)),
        VISUAL_OUTPUT: visual,
        **{name: torch.nested.as_nested_tensor(values, layout=torch.jagged) for name, values in more.items()},
    }
    tags = [{"is_padding": uid == "pad"} for uid in uids]
    queue.kv_batch_put(
        keys=keys, partition_id="train", fields=TensorDict(fields, batch_size=len(keys)), tags=[dict(t) for t in tags]
    )
    metrics: dict = {}
    try:
        batch = KVBatchMeta(keys=list(keys), tags=tags, partition_id="train")
        done = trainer_of(*overrides)._compute_advantage(batch, metrics)
        assert done.keys == keys and [tag["is_padding"] for tag in done.tags] == [tag["is_padding"] for tag in tags]
        names = ["advantages", "returns", "rm_scores"]
        data = queue.kv_batch_get(keys=keys, partition_id="train", select_fields=names)
        got, returns, rewards = (data[name].unbind() for name in names)
        for row, same in zip(got, returns, strict=True):
            assert torch.equal(row, same)
        return list(got), metrics, [float(row.sum()) for row in rewards]
    finally:
        queue.kv_clear(keys=list(keys), partition_id="train")


def check(got: list[torch.Tensor], expected: list[float], masks=MASKS) -> None:
    """Every response token has the rollout's number, every other token 0."""
    for row, value, mask in zip(got, expected, masks, strict=True):
        torch.testing.assert_close(row, value * torch.tensor(mask, dtype=torch.float32), rtol=2e-5, atol=1e-6)


NORMALIZE = "avar.vars.advantage=normalize_then_sum"
DR_GRPO = "algorithm.norm_adv_by_std_in_grpo=false"
ROOT_7, ROOT_2 = 7**0.5, 2**0.5
CASES = {
    # lambda_v cancels in a, and nearly does in b
    "sum, GRPO": ((), lambda v: [*A / ROOT_7, *B / ROOT_2]),
    "sum, Dr.GRPO": ((DR_GRPO,), lambda v: [*v * A, *(1 + 4 * v) / 2 * B]),
    "normalize": ((NORMALIZE,), lambda v: [*v * A / ROOT_7, *(1 + v) * B / ROOT_2]),
    "normalize, vectorized": (
        (NORMALIZE, "algorithm.adv_estimator=grpo_vectorized"),
        lambda v: [*v * A / ROOT_7, *(1 + v) * B / ROOT_2],
    ),
}


@pytest.mark.e2e
@pytest.mark.parametrize("lambda_v", [0.3, 0.03])
@pytest.mark.parametrize("case", CASES)
def test_advantages_by_hand(queue, case, lambda_v):
    overrides, formula = CASES[case]
    got, metrics, rewards = advantages(queue, f"avar.vars.lambda_v={lambda_v}", *overrides)
    check(got, [*(float(value) for value in formula(lambda_v)), 0.0])
    gated = [1.0, 2.0, 6.0, 4.0, 0.0]
    assert metrics["avar/r_visual/weighted"] == pytest.approx(lambda_v * sum(gated) / 5)
    paid = 0.0 if NORMALIZE in overrides else lambda_v
    outcome = [1.1, 1.1, 1.1, 1.1, 0.1]
    assert rewards == pytest.approx([*(score + paid * r for score, r in zip(outcome, gated, strict=True)), 0.0])
    if NORMALIZE in overrides:
        mean = lambda_v * (6 / ROOT_7 + 2 / ROOT_2) / 5
        assert metrics["avar/r_visual/advantage"] == pytest.approx(mean, rel=1e-5)
    else:
        assert "avar/r_visual/advantage" not in metrics


@pytest.mark.e2e
@pytest.mark.parametrize("overrides", [(), (NORMALIZE,)], ids=["sum", "normalize"])
@pytest.mark.parametrize("measure", ["false", "true"])
def test_with_lambda_0_advantages_are_verls(queue, overrides, measure):
    got, metrics, _ = advantages(queue, "avar.vars.lambda_v=0", f"avar.vars.measure={measure}", *overrides)
    check(got, [0.0, 0.0, 0.0, 1 / ROOT_2, -1 / ROOT_2, 0.0])
    assert not any(key.startswith("avar/r_visual") for key in metrics)


@pytest.mark.e2e
def test_shaping_comes_before_the_normalisation(queue):
    """Ranks 1/3, 2/3, 1 in a: mean 2/3, standard deviation 1/3. In b 1 and 0."""
    got, _, _ = advantages(queue, NORMALIZE, "avar.vars.shaping=rank")
    check(got, [-0.3, 0.0, 0.3, 1.3 / ROOT_2, -1.3 / ROOT_2, 0.0])


@pytest.mark.e2e
def test_wrong_answers_alone_get_nothing_from_r_visual(queue):
    got, metrics, _ = advantages(queue, NORMALIZE, accs=[0.0] * 5 + [1.0])
    check(got, [0.0] * 6)
    assert metrics["avar/r_visual/advantage"] == 0


@pytest.mark.e2e
def test_outputs_of_one_rollout_count_once(queue):
    """The first rollout has two outputs, of which the last is its answer: ratios 2, 6 and 4, not 1."""
    keys = ["a_0_0", "a_0_1", "a_2_0", "a_3_0", "b_1_0", "pad_0_0"]
    got, _, _ = advantages(queue, NORMALIZE, keys=keys, uids=["a"] * 4 + ["b", "pad"], accs=[1.0] * 6)
    # b has one rollout, whose r_visual of 9 and reward of 1.1 stay as they are, as in verl
    check(got, [-0.3, -0.3, 0.3, 0.0, 1.1 + 0.3 * 9, 0.0])


@pytest.mark.e2e
def test_rejected_tokens_get_nothing(queue):
    """verl's rejection sampling takes a token out of the first response: its probability has halved and more."""
    old = [torch.zeros(len(mask)) for mask in MASKS]
    rollout = [row.clone() for row in old]
    rollout[0][1] = 2.0
    options = ["rollout_rs=token_k1", "rollout_rs_threshold='0.5_2.0'"]
    overrides = [f"algorithm.rollout_correction.{option}" for option in options]
    got, _, _ = advantages(queue, NORMALIZE, *overrides, old_log_probs=old, rollout_log_probs=rollout)
    masks = [[1, 0], *MASKS[1:]]
    expected = [*0.3 * A / ROOT_7, *1.3 * B / ROOT_2, torch.tensor(0.0)]
    check(got, [float(value) for value in expected], masks)


@pytest.mark.parametrize(
    "choice, case", [("GRPO", "sum, GRPO"), ("Dr.GRPO", "sum, Dr.GRPO"), ("decoupled", "normalize")]
)
def test_the_example_of_the_docs(choice, case):
    lines = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {choice} | 0.3 |"))
    for line, lambda_v in zip(lines[first : first + 2], (0.3, 0.03), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        expected = [f"{float(value):.2f}" for value in CASES[case][1](lambda_v)]
        assert cells[1:] == [str(lambda_v), ", ".join(expected[:3]), ", ".join(expected[3:])]


# ---- the formula is verl's -----------------------------------------------------------------------------------------


def test_the_normalisation_is_that_of_verls_grpo():
    """The same numbers as verl's function for rewards on the last token, groups of one included."""
    generator = torch.Generator().manual_seed(0)
    uids = np.array([f"u{i}" for i in torch.randint(20, (64,), generator=generator).tolist()] + ["alone"], dtype=object)
    x = 5 * torch.rand(65, generator=generator)
    rewards, mask = torch.zeros(65, 3), torch.ones(65, 3)
    rewards[:, -1] = x
    for function in (core_algos.compute_grpo_outcome_advantage, core_algos.compute_grpo_vectorized_outcome_advantage):
        expected, _ = function(rewards, mask, uids)
        torch.testing.assert_close(group_normalize(x, group_index(uids)), expected[:, 0], rtol=1e-5, atol=1e-5)


def test_padding_is_in_no_group():
    """Even if it had the id of a real prompt."""
    tags = [{"is_padding": i == 1} for i in range(3)]
    batch = KVBatchMeta(keys=["a_0_0", "a_1_0", "a_2_0"], tags=tags, partition_id="train")
    out = visual_advantage(torch.tensor([1.0, 50.0, 3.0]), batch, ["a"] * 3)
    assert out.tolist() == pytest.approx([-1 / ROOT_2, 0, 1 / ROOT_2], rel=1e-5)


# ---- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [e.value for e in core_algos.AdvantageEstimator])
def test_the_advantage_must_be_normalised_by_the_group(estimator):
    config = recipe("avar_grpo", "machine=cpu_grpo", NORMALIZE, f"algorithm.adv_estimator={estimator}")
    vars_config = omega_conf_to_dataclass(config.avar.vars)
    if estimator in ESTIMATORS:
        check_grpo_config(config, vars_config)
    else:
        with pytest.raises(ValueError, match=f"got '{estimator}'. Set avar.vars.advantage=sum_then_normalize"):
            check_grpo_config(config, vars_config)
    OmegaConf.update(config, "avar.vars.advantage", "sum_then_normalize")
    check_grpo_config(config, omega_conf_to_dataclass(config.avar.vars))


def test_without_the_division_there_is_nothing_to_decouple():
    config = recipe("avar_grpo", "machine=cpu_grpo", NORMALIZE, DR_GRPO)
    with pytest.raises(ValueError, match="got algorithm.norm_adv_by_std_in_grpo=False.*sum_then_normalize"):
        check_grpo_config(config, omega_conf_to_dataclass(config.avar.vars))
