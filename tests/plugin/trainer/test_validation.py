# SPDX-License-Identifier: Apache-2.0
"""Validation rollouts with images and parts, through a real TransferQueue into wandb, tensorboard and trackio."""

import json
import math
import sqlite3

import pytest
from omegaconf import OmegaConf
from PIL import Image
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tracking import Tracking, ValidationGenerationsLogger

from avar_verl.plugin.config import VarsConfig
from avar_verl.plugin.trainer.ppo import AvarPPOTrainer
from avar_verl.plugin.trainer.validation import COLUMNS, ValidationSamples, first_rollouts, side_by_side
from tests.plugin.trainer.test_rollouts import nested, picture, prompt, tokenizer


def put(queue, places: dict[str, int], colors: dict[str, str]):
    """Two rollouts of every prompt; `places`: where a prompt is in the data."""
    keys = [f"{name}_{rollout}_0" for name in places for rollout in (1, 0)]
    names = [key.split("_")[0] for key in keys]
    rollouts = [int(key.split("_")[1]) for key in keys]
    infos = [{"acc": float(rollout), "why": "x", name: 2} for name, rollout in zip(names, rollouts, strict=True)]
    fields = TensorDict(
        {
            "responses": nested(*([97 + rollout, 0] for rollout in rollouts)),
            "rm_scores": nested(*([0.0, 0.5 + rollout] for rollout in rollouts)),
            "reward_model": NonTensorStack(*({"ground_truth": name} for name in names)),
            "data_source": NonTensorStack(*(f"set {name}" for name in names)),
            "extra_info": NonTensorStack(*({"index": places[name]} for name in names)),
            "extra_fields": NonTensorStack(*({"reward_extra_info": info} for info in infos)),
            "raw_prompt": NonTensorStack(*(prompt(picture(colors[name]), question=f"{name}?") for name in names)),
        },
        batch_size=len(keys),
    )
    return queue.kv_batch_put(keys=keys, partition_id="val", fields=fields, tags=[{}] * len(keys))


class Buffer:
    """Hands out batches in order."""

    def __init__(self, batches):
        self.batches = list(batches)

    def sample(self, **kwargs):
        return self.batches.pop(0), {}


def test_the_first_rollout_of_every_prompt_with_its_last_output():
    assert first_rollouts(["b_0_0", "a_1_0", "a_0_1", "a_0_0", "b_0_2"]) == ["a_0_1", "b_0_2"]


def test_images_of_a_prompt_are_one_picture():
    assert side_by_side([]) is None
    wide = side_by_side([picture("red"), Image.new("RGB", (1024, 512), "blue")])
    assert wide.size == (12 + 512, 256)
    assert wide.getpixel((3, 3)) == (255, 0, 0) and wide.getpixel((3, 200)) == (255, 255, 255)
    assert wide.getpixel((300, 200)) == (0, 0, 255)


@pytest.mark.e2e
def test_images_and_parts_reach_wandb_and_tensorboard(queue, tmp_path, monkeypatch):
    """Three wanted: both prompts of the first batch in the order of the data, one of the second."""
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    named = {"a": "red", "b": "blue", "c": "green", "d": "white"}
    batches = [put(queue, {"a": 1, "b": 0}, named), put(queue, {"c": 3, "d": 2}, named)]
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "tensorboard"))
    trainer = object.__new__(AvarPPOTrainer)
    trainer.vars, trainer.tokenizer, trainer.global_steps = VarsConfig(lambda_v=0), tokenizer(), 4
    settings = {"log_val_generations": 3, "logger": ["console", "wandb", "tensorboard"]}
    trainer.config = OmegaConf.create({"trainer": settings})
    trainer.validation_generations_logger = ValidationGenerationsLogger("p", "e")
    trainer.replay_buffer = buffer = Buffer(batches)

    def verls(self):
        """The part of verl's validation that touches the buffer and the loggers."""
        for _ in range(2):
            self.replay_buffer.sample(partition_id="val")
        self._maybe_log_val_generations(["x"] * 4, ["y"] * 4, [0.0] * 4)
        return {"val": 1.0}

    monkeypatch.setattr(PPOTrainerSync, "_validate", verls)
    run = wandb.init(mode="offline", dir=str(tmp_path), project="p", settings=wandb.Settings(console="off"))
    assert trainer._validate() == {"val": 1.0} and trainer.replay_buffer is buffer
    folder = tmp_path / "wandb"
    run.finish()
    queue.kv_clear(keys=[key for batch in batches for key in batch.keys], partition_id="val")

    (file,) = folder.rglob("rollouts*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"][:7] == ["step", "data_source", "image", "prompt", "response", "ground_truth", "score"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["prompt"], row["response"], row["score"], row["acc"]) for row in rows] == [
        ("b?", "a", 0.5, 0.0), ("a?", "a", 0.5, 0.0), ("d?", "a", 0.5, 0.0),
    ]  # fmt: skip
    assert [row["image"] for row in rows] == ["Image"] * 3
    assert rows[0]["b"] == 2 and rows[1]["b"] is None and "why" not in table["columns"]
    colors = [(0, 0, 255), (255, 0, 0), (255, 255, 255)]
    assert [row["image"].getpixel((3, 3)) for row in trainer._samples.rows] == colors
    # wandb keeps the images of a table in its data folder, without a suffix, until they are uploaded.
    staged = [path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.read_bytes()[1:4] == b"PNG"]
    assert sorted(Image.open(path).convert("RGB").getpixel((3, 3)) for path in staged) == sorted(colors)

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == [f"val/rollouts/{at}" for at in range(3)]
    (event,) = events.Images("val/rollouts/1")
    assert event.step == 4 and (event.width, event.height) == (12, 8)
    assert {f"val/rollouts/{at}/text_summary" for at in range(3)} <= set(events.Tags()["tensors"])


def test_the_table_reaches_trackio(tmp_path, monkeypatch):
    """Into trackio's files on this machine, through verl's own logger."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # Read when trackio is imported.
    pytest.importorskip("trackio", reason="not in the environment of `make env`: pip install trackio")
    tracking = Tracking("p", "e", default_backend=["trackio"])
    samples = ValidationSamples(2, None)
    row = {"data_source": "s", "prompt": "p", "response": "r", "ground_truth": "g", "score": 0.5}
    samples.rows = [{**row, "image": picture("red"), "parts": {"acc": 1.0}}, {**row, "image": None, "parts": {}}]
    samples.log(["console", "trackio"], 4, None)
    tracking.logger["trackio"].finish()
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        records = database.execute("select step, metrics from metrics").fetchall()
    logged = [(step, json.loads(text)) for step, text in records]
    ((step, table),) = [(step, data["val/rollouts"]) for step, data in logged if "val/rollouts" in data]
    first, second = table["_value"]
    assert step == 4 and list(first) == [*COLUMNS, "acc"] and (first["acc"], second["acc"]) == (1.0, None)
    assert second["image"] is None and first["response"] == "r"
    (file,) = (tmp_path / "trackio").rglob("*.png")
    assert first["image"]["file_path"].endswith(file.name)
    assert Image.open(file).convert("RGB").getpixel((3, 3)) == (255, 0, 0)


def test_text_of_a_model_has_no_markup_in_tensorboard():
    row = {"data_source": "s", "prompt": "p\n# q", "response": "<b>x</b>\n\ny", "ground_truth": "g", "score": 1.0}
    text = ValidationSamples(1, None).markdown({**row, "parts": {"acc": 1.0, "iou": math.nan}})
    assert all(line.startswith("    ") for line in text.splitlines()) and "    # q" in text and "acc: 1" in text


def test_nothing_is_taken_if_nothing_is_wanted():
    """The batch is not looked at."""
    ValidationSamples(0, None).add(None)
    trainer = object.__new__(AvarPPOTrainer)
    trainer.config = OmegaConf.create({"trainer": {"log_val_generations": 0, "logger": ["wandb"]}})
    trainer._maybe_log_val_generations([], [], [])
