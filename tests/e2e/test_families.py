# SPDX-License-Identifier: Apache-2.0
"""Every family through verl's trainers: the cold start with guidance on two processes, GRPO with vLLM rollouts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from avar_verl.model.families import FAMILIES, get_family
from tests.e2e import family_data, launch
from tests.model.families.tiny import build_tiny

# No system turn in their chat templates.
WITHOUT_SYSTEM = ("gemma3",)
# vLLM 0.24 has no Llama 3.2 Vision.
# On the language model alone: verl's default, all-linear, has the vision tower in it.
LORA = ["model.lora_rank=4", "model.lora_alpha=8", "model.target_modules='.*language_model.*[qkvo]_proj'"]
ROLLOUTS = [name for name in sorted(FAMILIES) if name != "mllama"]


def guidance(model_type: str) -> list[str]:
    """Where no softmax has image and system keys there is L_suppress alone; Gemma 3 has layers with a window."""
    settings = ["avar.agto.alpha=0"] if get_family(model_type).cross_attention else []
    return [*settings, "avar.agto.layers=[1]", "avar.vars.layers=[1]"] if model_type == "gemma3" else settings


def sft_overrides(work: Path, model: Path, data: Path, model_type: str, packed: bool) -> list[str]:
    return [
        "machine=cpu_sft",
        f"model.path={model}",
        f"model.use_remove_padding={packed}",
        f"data.train_files={data}",
        "data.max_length=1024",
        "data.train_batch_size=4",
        f"data.micro_batch_size_per_gpu={2 if packed else 1}",
        "optim.lr=1e-3",
        "avar.agto.query_role=response",
        *guidance(model_type),
        "trainer.total_epochs=1",
        "trainer.test_freq=-1",
        "trainer.save_freq=2",
        "checkpoint.save_contents=[hf_model]",
        f"trainer.default_local_dir={work / 'checkpoints' / (model_type + '_packed' * packed)}",
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: build_tiny(name, folder / name) for name in sorted(FAMILIES)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, models):
    """All families, two steps of four samples on two processes, one sample a micro-batch: while one process has an
    image, the other often has none. Then again in packed micro-batches. Returns the folder and the errors by run."""
    work = tmp_path_factory.mktemp("sft")
    spec = []
    # Padded ones first: for packed samples verl patches the attention of Qwen2-VL and Qwen2.5-VL in one go.
    for packed in (False, True):
        for name, model in models.items():
            if not (packed and get_family(name).unpackable):
                data = family_data.make_sft(work / f"{name}.parquet", 8, name not in WITHOUT_SYSTEM)
                overrides = sft_overrides(work, model, data, name, packed)
                spec.append({"name": name + "_packed" * packed, "overrides": overrides})
    overrides = sft_overrides(work, models["internvl"], work / "internvl.parquet", "internvl", packed=False)
    spec.append({"name": "lora", "overrides": [*overrides, *LORA, f"trainer.default_local_dir={work / 'lora'}"]})
    (work / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.e2e.sft_families", str(work)]
    with (work / "log").open("w") as log:
        subprocess.run(
            command, env=launch.environment(work / "unused"), stdout=log, stderr=subprocess.STDOUT, timeout=840
        )
    assert (work / "errors.json").exists(), (work / "log").read_text(errors="replace")[-6000:]
    return work, json.loads((work / "errors.json").read_text())


@pytest.mark.e2e
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_guided_cold_start_moves_parameters(trained, models, model_type):
    work, errors = trained
    assert model_type not in errors, errors[model_type]
    metrics = launch.steps(work / f"{model_type}.jsonl")
    assert sorted(metrics) == [1, 2]
    crosses = get_family(model_type).cross_attention
    for record in metrics.values():
        assert record["avar/guided_samples"] == 2, "half of the samples are text alone"
        terms = record["avar/suppress"] + (0 if crosses else record["avar/enhance"])
        assert record["train/loss"] == pytest.approx(record["avar/lm_loss"] + 0.15 * terms, rel=1e-4)
        assert ("avar/vas" in record) != crosses
    before = AutoModelForImageTextToText.from_pretrained(models[model_type]).state_dict()
    folder = work / "checkpoints" / model_type / "global_step_2" / "huggingface"
    after = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name].to(tensor.dtype))}
    for part in ("q_proj", "k_proj"):
        assert any(part in name and "layers.0" in name for name in moved), part
    tower = get_family(model_type).vision_tower.split(".")[-1]
    assert any(tower in name for name in moved), "the vision tower is trained"


@pytest.mark.e2e
@pytest.mark.parametrize("model_type", [name for name in sorted(FAMILIES) if not get_family(name).unpackable])
def test_packing_changes_nothing(trained, model_type):
    work, errors = trained
    assert f"{model_type}_packed" not in errors, errors[f"{model_type}_packed"]
    padded, packed = (launch.steps(work / f"{model_type}{kind}.jsonl") for kind in ("", "_packed"))
    for step, record in packed.items():
        for key in ("train/loss", "train/grad_norm", "avar/enhance", "avar/suppress", "avar/image_share"):
            assert record[key] == pytest.approx(padded[step][key], rel=1e-3), (step, key)


@pytest.mark.e2e
def test_lora_trains_adapters_of_the_language_model(trained, models):
    work, errors = trained
    assert "lora" not in errors, errors["lora"]
    assert launch.steps(work / "lora.jsonl")[2]["avar/guided_samples"] == 2
    before = AutoModelForImageTextToText.from_pretrained(models["internvl"]).state_dict()
    after = load_file(work / "lora" / "global_step_2" / "huggingface" / "model.safetensors")
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in after.items()}
    adapters = {name: tensor for name, tensor in after.items() if "lora_" in name}
    assert adapters and all("language_model" in name for name in adapters)
    assert all(bool(tensor.any()) for name, tensor in adapters.items() if "lora_B" in name), "B starts as zeros"
    for name in after.keys() - adapters.keys():
        assert torch.equal(after[name], before[name].to(after[name].dtype)), name


# The policy has learned nothing: half of the responses are called right by their length (see test_grpo_launcher).
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = float(len(solution_str) % 2)
    return {"score": right, "acc": right}
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model_type", ROLLOUTS)
def test_grpo_with_vllm_rollouts(models, tmp_path, model_type):
    family_data.make_rl(tmp_path / "rl.parquet", 4, model_type not in WITHOUT_SYSTEM)
    (tmp_path / "reward.py").write_text(REWARD)
    overrides = [
        "actor_rollout_ref.model.use_remove_padding=false",
        "data.max_prompt_length=512",
        "data.max_response_length=24",
        "actor_rollout_ref.rollout.max_model_len=768",
        f"reward.custom_reward_function.path={tmp_path / 'reward.py'}",
        "avar.vars.statistic=image_share",
        *guidance(model_type),
        "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
        "trainer.total_training_steps=2",
        "trainer.total_epochs=2",
        "trainer.save_freq=2",
    ]
    command = launch.grpo(tmp_path, models[model_type], tmp_path / "rl.parquet", overrides)
    metrics = launch.run(command, tmp_path, "grpo")
    assert sorted(metrics) == [1, 2]
    for record in metrics.values():
        assert record["avar/measured_rollouts"] == 16
        assert 0 < record["avar/image_share"] < 1
        assert record["actor/grad_norm"] > 0
        # vLLM and the actor saw the same tokens and the same image, before the update and after it.
        assert record["training/rollout_actor_probs_pearson_corr"] > 0.99
    before = AutoModelForImageTextToText.from_pretrained(models[model_type], dtype=torch.float32).state_dict()
    folder = tmp_path / "checkpoints" / "global_step_2" / "actor" / "huggingface"
    after = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert any(not torch.equal(tensor, after[name].to(tensor.dtype)) for name, tensor in before.items())
