# SPDX-License-Identifier: Apache-2.0
"""The cold start through `torchrun -m verl.trainer.sft_trainer`: guidance, DP 2, kill and resume, hand-over."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from avar_verl.tools.demo import photo_grid
from tests.e2e import launch

pytestmark = pytest.mark.e2e

GUIDED = [
    "data.train_batch_size=8",
    "data.micro_batch_size_per_gpu=4",
    "trainer.total_training_steps=4",
    "trainer.total_epochs=2",
    "trainer.save_freq=2",
    "avar.agto.query_role=response",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sft.parquet"
    # Three steps an epoch: verl loses an epoch when it resumes from a checkpoint at the end of one.
    photo_grid.make_sft_parquet(path, 24, 0, "train")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_path, data):
    """An uninterrupted run: its folder and metrics."""
    work = tmp_path_factory.mktemp("whole")
    return work, launch.run(launch.sft(work, tiny_model_path, data, GUIDED), work, "whole")


def test_metrics_are_numbers_in_the_log(whole):
    _, metrics = whole
    assert sorted(metrics) == [1, 2, 3, 4]
    for record in metrics.values():
        for key in ("enhance", "suppress", "image_mass", "system_mass", "vas", "image_share", "lm_loss"):
            assert isinstance(record[f"avar/{key}"], float), key
        guidance = 0.15 * (record["avar/enhance"] + record["avar/suppress"])
        assert record["train/loss"] == pytest.approx(record["avar/lm_loss"] + guidance, rel=1e-5)


def test_a_checkpoint_is_a_hugging_face_folder_that_has_moved(whole, tiny_model_path):
    work, _ = whole
    folder = work / "checkpoints" / "global_step_4" / "huggingface"
    assert AutoProcessor.from_pretrained(folder).tokenizer.chat_template
    before = AutoModelForImageTextToText.from_pretrained(tiny_model_path).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    # The embedding rows of unseen words do not move; every parameter has elements that do.
    still = [name for name, tensor in before.items() if torch.equal(tensor, after[name].to(tensor.dtype))]
    assert not still


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path, tiny_model_path, data):
    _, expected = whole
    command = launch.sft(tmp_path, tiny_model_path, data, GUIDED)
    launch.run_and_kill(command, tmp_path, "killed", after_step=2)
    resumed = launch.run(command, tmp_path, "resumed")
    assert sorted(resumed) == [3, 4]
    for step, record in resumed.items():
        for key in ("train/loss", "train/grad_norm", "train/lr", "avar/enhance", "avar/image_share", "avar/schedule"):
            assert record[key] == pytest.approx(expected[step][key], rel=1e-5), (step, key)


def test_two_processes_train_the_same(whole, tmp_path, tiny_model_path, data):
    _, expected = whole
    metrics = launch.run(launch.sft(tmp_path, tiny_model_path, data, GUIDED, processes=2), tmp_path, "two")
    for step, record in metrics.items():
        for key in ("train/loss", "train/grad_norm", "avar/lm_loss", "avar/enhance", "avar/suppress", "avar/vas"):
            assert record[key] == pytest.approx(expected[step][key], rel=1e-3), (step, key)
