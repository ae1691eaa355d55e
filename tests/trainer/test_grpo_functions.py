# SPDX-License-Identifier: Apache-2.0
"""The trainer's arithmetic, and r_visual through a real TransferQueue."""

import math

import pytest
import torch

from avar_verl.config import VarsConfig
from avar_verl.engine.fsdp import VISUAL_OUTPUT
from avar_verl.objectives.reward import VISUAL_FIELDS
from avar_verl.trainer.grpo import AvarPPOTrainer, correct_answers, reward_part_metrics, visual_metrics


def test_gate():
    infos = [{"acc": 1.0}, {"acc": 0.5}, {"acc": True}, {"acc": 1}]
    assert correct_answers(infos, [True, True, True, False], VarsConfig()).tolist() == [True, False, True, False]
    other = VarsConfig(gate_key="score", gate_threshold=0.2)
    assert correct_answers([{"score": 0.3, "acc": 0}], [True], other).tolist() == [True]


def test_placeholders_are_forbidden_and_other_biases_stay():
    from avar_verl.rollout.agent_loop import forbid

    given = {"temperature": 1.0, "logit_bias": {7: 2.0}}
    assert forbid(given, [3, 4])["logit_bias"] == {7: 2.0, 3: -100.0, 4: -100.0}
    assert given == {"temperature": 1.0, "logit_bias": {7: 2.0}} and forbid({}, [3])["logit_bias"] == {3: -100.0}


def test_a_reward_function_without_the_gate_is_an_error():
    with pytest.raises(ValueError, match=r"'acc' tells; it returned \['score'\].*gate_key"):
        correct_answers([{"score": 1.0}], [True], VarsConfig())


def test_parts_are_means_over_real_rollouts_and_words_are_left_out():
    infos = [{"acc": 1.0, "why": "x"}, {"acc": 0.0, "why": "y"}, {"acc": 9.0, "why": "z"}]
    assert reward_part_metrics(infos, [True, True, False]) == {"avar/reward/acc": 0.5}
    assert reward_part_metrics(infos, [False] * 3) == {}


def rows(*ratios: float) -> torch.Tensor:
    """(B, F) with the given ratio, the other fields 0.5."""
    out = torch.full((len(ratios), len(VISUAL_FIELDS)), 0.5)
    out[:, 0] = torch.tensor(ratios)
    return out


def test_metrics_leave_out_padding_and_what_is_not_defined():
    visual = rows(2.0, 4.0, math.nan, 100.0)
    correct = torch.tensor([True, False, False, False])
    shaped = torch.tensor([2.0, 0, 0, 0])
    out = visual_metrics(visual, correct, [True, True, True, False], visual[:, 0], shaped, 0.3 * shaped)
    assert out["avar/measured_rollouts"] == 2 and out["avar/vas"] == 3 and out["avar/r_visual/raw"] == 3
    assert out["avar/correct"] == pytest.approx(1 / 3)
    assert out["avar/r_visual/gated"] == pytest.approx(2 / 3)
    assert out["avar/r_visual/weighted"] == pytest.approx(0.2)


@pytest.fixture(scope="module")
def queue():
    """A TransferQueue of one storage unit on a local Ray."""
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer").transfer_queue
    OmegaConf.update(config, "backend.SimpleStorage.num_data_storage_units", 1)
    tq.init(config)
    yield tq
    tq.close()
    ray.shutdown()


@pytest.mark.e2e
@pytest.mark.parametrize(
    "vars_config, expected",
    [
        # rows: right, wrong, right (1 token), padding; raw 2, 4, 8, 100; outcome rewards 1.1, 0.1, 1, 0
        (VarsConfig(), [[0, 0, 1.1 + 0.3 * 2], [0, 0.1], [1.0 + 0.3 * 8], [0.0]]),
        (VarsConfig(shaping="clip", clip_max=3.0), [[0, 0, 1.1 + 0.6], [0, 0.1], [1.0 + 0.9], [0.0]]),
        (VarsConfig(lambda_v=0.0, measure=True), [[0, 0, 1.1], [0, 0.1], [1.0], [0.0]]),
        (VarsConfig(lambda_v=0.0), [[0, 0, 1.1], [0, 0.1], [1.0], [0.0]]),
    ],
    ids=["paper", "clip", "lambda 0 measured", "lambda 0"],
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
            VISUAL_OUTPUT: rows(2.0, 4.0, 8.0, 100.0),
        },
        batch_size=4,
    )
    tags = [{"is_padding": i == 3} for i in range(4)]
    batch = queue.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
    batch.tags = tags
    trainer = object.__new__(AvarPPOTrainer)
    trainer.vars = vars_config
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
