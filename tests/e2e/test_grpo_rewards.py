# SPDX-License-Identifier: Apache-2.0
"""GRPO through verl's launcher with every shipped reward, chosen by one override. Minutes each: `make slow`."""

import pandas as pd
import pytest

from avar_verl.tools.demo import photo_grid
from tests.e2e import launch

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
