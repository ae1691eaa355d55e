# SPDX-License-Identifier: Apache-2.0
"""The cold start through verl's SFT trainer: kill and resume, hand-over, DP 2, every family, packed, LoRA."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from avar_verl.model.families import FAMILIES, get_family
from avar_verl.tools.demo import photo_grid
from tests.e2e import family_data, launch
from tests.model.families import outside

pytestmark = pytest.mark.e2e

# The mixture of experts of Qwen3.5 has the linear attention of Qwen3.5.
PACKED = [name for name in sorted(FAMILIES) if not get_family(name).unpackable and name != "qwen3_5_moe"]
# Of the language model only: verl's default, all-linear, has the vision tower in it.
LORA = ["model.lora_rank=4", "model.lora_alpha=8", "model.target_modules='.*language_model.*[qkvo]_proj'"]


@pytest.fixture(scope="module")
def sft_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sft.parquet"
    # Three steps an epoch: verl loses an epoch when it resumes from a checkpoint at the end of one.
    photo_grid.make_sft_parquet(path, 24, 0, "train")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, family_path, tiny_model_path, sft_data):
    """Runs on two processes: their folder, and the errors by run.

    Every family, two steps of four samples, one sample a micro-batch: while one process has an image, the other often
    has none. Then again in packed micro-batches, and with LoRA. `two`: what `resumed` trains on one process.
    """
    work = tmp_path_factory.mktemp("sft")
    runs = {}
    # Padded ones first: for packed samples verl patches the attention of Qwen2-VL and Qwen2.5-VL in one go.
    for packed in (False, True):
        for name in sorted(FAMILIES):
            if not packed or name in PACKED:
                run = name + "_packed" * packed
                data = family_data.make_sft(work / f"{name}.parquet", 8, name)
                runs[run] = family_data.sft_overrides(work / run, family_path(name), data, name, packed)
    # A family of an installed package, which every process finds by itself.
    data = family_data.make_sft(work / "llava.parquet", 8, "llava")
    runs["llava"] = family_data.sft_overrides(work / "llava", family_path("llava"), data, "llava", packed=False)
    site = outside.install_package(tmp_path_factory.mktemp("llava"))
    data = work / "internvl.parquet"
    lora = family_data.sft_overrides(work / "lora", family_path("internvl"), data, "internvl", packed=False)
    runs["lora"] = [*lora, *LORA]
    runs["two"] = [*launch.sft_overrides(work / "two", tiny_model_path, sft_data), *launch.GUIDED]
    (work / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.e2e.sft_runs", str(work)]
    with (work / "log").open("w") as log:
        subprocess.run(
            command,
            env=launch.environment(work / "unused") | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=840,
        )
    assert (work / "errors.json").exists(), (work / "log").read_text(errors="replace")[-6000:]
    return work, json.loads((work / "errors.json").read_text())


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, tiny_model_path, sft_data):
    """Two steps, a kill, the others from the checkpoint, on one process: the folder, and the metrics by step."""
    work = tmp_path_factory.mktemp("resumed")
    command = launch.sft(work, [*launch.sft_overrides(work, tiny_model_path, sft_data), *launch.GUIDED])
    killed = launch.run_and_kill(command, work, "killed", after_step=2)
    rest = launch.run(command, work, "resumed")
    assert sorted(rest) == [3, 4], "resuming must not repeat a step"
    return work, killed | rest


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, tiny_model_path, sft_data):
    """`nodes(folder, name)` -> the recipe's script on two nodes of one process, four steps; again, it goes on."""
    work = tmp_path_factory.mktemp("nodes")

    def start(folder: str, name: str) -> launch.Nodes:
        (work / folder).mkdir(exist_ok=True)
        overrides = [*launch.sft_overrides(work / folder, tiny_model_path, sft_data), *launch.GUIDED]
        overrides += [f"hydra.run.dir={work / folder / 'hydra'}"]
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launch.free_port(), "TRAIN": str(sft_data)}
        return launch.Nodes("run_sft_qwen2_5_vl_7b.sh", overrides, work / folder, name, own)

    return start


@pytest.fixture(scope="module")
def two_nodes(nodes) -> dict[int, dict]:
    with nodes("whole", "log") as started:
        assert started.wait() == [0, 0], started.text()
    return launch.steps(started.metrics)


def assert_same_losses(metrics: dict[int, dict], expected: dict[int, dict]) -> None:
    """And masses, terms and schedules."""
    assert sorted(metrics) == sorted(expected) == [1, 2, 3, 4]
    for step, record in metrics.items():
        for key in (
            *("train/loss", "train/grad_norm"),
            *(f"avar/{name}" for name in ("lm_loss", "enhance", "suppress", "vas", "image_mass", "system_mass")),
        ):
            assert record[key] == pytest.approx(expected[step][key], rel=1e-3), (step, key)
        for key in ("train/lr", "avar/schedule"):
            assert record[key] == pytest.approx(expected[step][key], rel=1e-6), (step, key)


def test_metrics_are_numbers_in_the_log(resumed):
    _, metrics = resumed
    assert sorted(metrics) == [1, 2, 3, 4]
    for record in metrics.values():
        for key in ("enhance", "suppress", "image_mass", "system_mass", "vas", "image_share", "lm_loss"):
            assert isinstance(record[f"avar/{key}"], float), key
        guidance = 0.15 * (record["avar/enhance"] + record["avar/suppress"])
        assert record["train/loss"] == pytest.approx(record["avar/lm_loss"] + guidance, rel=1e-5)


def test_a_checkpoint_is_a_hugging_face_folder_that_has_moved(resumed, tiny_model_path):
    work, _ = resumed
    folder = work / "checkpoints" / "global_step_4" / "huggingface"
    assert AutoProcessor.from_pretrained(folder).tokenizer.chat_template
    before = AutoModelForImageTextToText.from_pretrained(tiny_model_path).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    # The embedding rows of unseen words do not move; every parameter has elements that do.
    still = [name for name, tensor in before.items() if torch.equal(tensor, after[name].to(tensor.dtype))]
    assert not still


def test_killed_and_resumed_on_one_process_equals_uninterrupted_on_two(resumed, trained):
    _, metrics = resumed
    work, errors = trained
    assert "two" not in errors, errors["two"]
    assert_same_losses(metrics, launch.steps(work / "two.jsonl"))


def test_two_nodes_train_as_one_process_and_as_two(two_nodes, resumed, trained):
    assert_same_losses(two_nodes, resumed[1])
    assert_same_losses(two_nodes, launch.steps(trained[0] / "two.jsonl"))


@pytest.mark.slow
def test_two_nodes_end_when_a_process_dies_and_go_on_from_the_checkpoint(nodes, two_nodes):
    with nodes("killed", "first") as first:
        first.kill_training_process(first.metrics.parent / "checkpoints" / "latest_checkpointed_iteration.txt", 2)
        assert all(first.wait()), first.text()
    with nodes("killed", "second") as second:
        assert second.wait() == [0, 0], second.text()
    rest = launch.steps(second.metrics)
    assert sorted(rest) == [3, 4], "resuming must not repeat a step"
    assert_same_losses(launch.steps(first.metrics) | rest, two_nodes)


# ---- families -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_guided_cold_start_moves_parameters(trained, family_path, model_type):
    work, errors = trained
    assert model_type not in errors, errors[model_type]
    metrics = launch.steps(work / f"{model_type}.jsonl")
    assert sorted(metrics) == [1, 2]
    crosses = get_family(model_type).cross_attention
    for record in metrics.values():
        assert record["avar/guided_samples"] == 2, "half of the samples are text only"
        terms = record["avar/suppress"] + (0 if crosses else record["avar/enhance"])
        assert record["train/loss"] == pytest.approx(record["avar/lm_loss"] + 0.15 * terms, rel=1e-4)
        assert ("avar/vas" in record) != crosses
    before = AutoModelForImageTextToText.from_pretrained(family_path(model_type)).state_dict()
    folder = work / model_type / "checkpoints" / "global_step_2" / "huggingface"
    after = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name].to(tensor.dtype))}
    for part in ("q_proj", "k_proj"):
        assert any(part in name for name in moved), part
    tower = get_family(model_type).vision_tower.split(".")[-1]
    assert any(tower in name for name in moved), "the vision tower is trained"


def test_a_family_of_an_installed_package_is_trained(trained, family_path):
    work, errors = trained
    assert "llava" not in errors, errors["llava"]
    assert launch.steps(work / "llava.jsonl")[2]["avar/guided_samples"] == 2
    before = AutoModelForImageTextToText.from_pretrained(family_path("llava")).state_dict()
    folder = work / "llava" / "checkpoints" / "global_step_2" / "huggingface"
    after = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert any(not torch.equal(tensor, after[name].to(tensor.dtype)) for name, tensor in before.items())


@pytest.mark.parametrize("model_type", PACKED)
def test_packing_changes_nothing(trained, model_type):
    work, errors = trained
    assert f"{model_type}_packed" not in errors, errors[f"{model_type}_packed"]
    padded, packed = (launch.steps(work / f"{model_type}{kind}.jsonl") for kind in ("", "_packed"))
    for step, record in packed.items():
        for key in ("train/loss", "train/grad_norm", "avar/enhance", "avar/suppress", "avar/image_share"):
            assert record[key] == pytest.approx(padded[step][key], rel=1e-3), (step, key)


def test_lora_trains_adapters_of_the_language_model(trained, family_path):
    work, errors = trained
    assert "lora" not in errors, errors["lora"]
    assert launch.steps(work / "lora.jsonl")[2]["avar/guided_samples"] == 2
    before = AutoModelForImageTextToText.from_pretrained(family_path("internvl")).state_dict()
    after = load_file(work / "lora" / "checkpoints" / "global_step_2" / "huggingface" / "model.safetensors")
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in after.items()}
    adapters = {name: tensor for name, tensor in after.items() if "lora_" in name}
    assert adapters and all("language_model" in name for name in adapters)
    assert all(bool(tensor.any()) for name, tensor in adapters.items() if "lora_B" in name), "B starts as zeros"
    for name in after.keys() - adapters.keys():
        assert torch.equal(after[name], before[name].to(after[name].dtype)), name


@pytest.mark.slow
def test_no_adapter_is_trained_in_a_frozen_tower(tmp_path, tiny_model_path, sft_data):
    """verl's default target, all-linear, has the tower in it; the projector, the merger, is not frozen with it."""
    overrides = [
        *launch.sft_overrides(tmp_path, tiny_model_path, sft_data),
        *launch.GUIDED,
        "trainer.total_training_steps=1",
        "trainer.save_freq=1",
        "model.lora_rank=4",
        "model.lora_alpha=8",
        "model.target_modules=all-linear",
        "engine.freeze_vision_tower=true",
    ]
    launch.run(launch.sft(tmp_path, overrides), tmp_path, "frozen")
    saved = load_file(tmp_path / "checkpoints" / "global_step_1" / "huggingface" / "model.safetensors")
    adapters = {name: bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name}
    assert {"merger" in name for name in adapters if ".visual." in name} == {True}
    assert any("language_model" in name for name in adapters) and all(adapters.values()), "all of them have moved"
