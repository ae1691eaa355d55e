# SPDX-License-Identifier: Apache-2.0
"""verl's training worker with and without guidance: parity with stock verl, and what must not change the result."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForImageTextToText

from avar_verl.model.checkpoint import Checkpoint
from avar_verl.model.corrupt import blank
from avar_verl.model.families import FAMILIES, get_family
from avar_verl.model.render import Rendered, collate
from avar_verl.objectives.vars import MASS_FIELDS, VISUAL_FIELDS
from avar_verl.tools.demo import photo_grid
from avar_verl.tools.study import loops
from tests.compatibility import ENTROPY, KL_LOSS
from tests.e2e import family_data, tool_data
from tests.model.families.tiny import SPECS

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[3]
GUIDED = {"alpha": 0.15, "beta": 0.1, "query_role": "both", "warmup_steps": 2}
# An update with advantages of accuracy and r_visual, and with every other term of the loss.
GRPO = {"overrides": [*KL_LOSS, ENTROPY], "rewarded": True}
DEPENDENCY = {"measure_dependency": True, "token_weights": "dependency"}
# Of a picture of the photo grid, before the crop that the tool returned.
PROMPT_ROWS = {"pixel_values": 64, "image_grid_thw": 1}
# Mixtures of experts of another family; and test_sft.py compares packed and padded training of these.
ONCE = ("qwen3_5",)
SAME = ("qwen3_5_moe", "glm4v_moe")
FAMILY_SCENARIOS = [
    *(name for name in sorted(FAMILIES) if name not in SAME),
    *(f"{name}_packed" for name in sorted(FAMILIES) if not get_family(name).unpackable and name not in ONCE + SAME),
]
LORA = {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}
# 2e-5 is 2 % of a step of 1e-3. (Adam divides a gradient by its own size, which would make rounding of one near zero as
# large as a step: its epsilon in scenarios.py is above that.)
TOLERANCE = dict(rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    """24 samples, every eighth without an image."""
    path = tmp_path_factory.mktemp("engine") / "sft.parquet"
    photo_grid.make_sft_parquet(path, 24, 0, "train")
    rows = pd.read_parquet(path)
    for index in range(3, 24, 8):
        messages = [dict(message) for message in rows.at[index, "messages"]]
        messages[0]["content"] = messages[0]["content"].replace("<image>", "")
        rows.at[index, "messages"], rows.at[index, "images"] = messages, []
    rows.to_parquet(path)
    return path


def run(work: Path, model: Path, data: Path, scenarios: dict[str, dict], processes: int = 1) -> dict:
    work.mkdir(exist_ok=True)
    spec = {"model": str(model), "data": str(data), "scenarios": [{"name": n, **s} for n, s in scenarios.items()]}
    (work / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "tests.plugin.engine.scenarios", str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(work / "result.pt", weights_only=False)


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_model_path, data_file, family_path) -> dict:
    """Every scenario that needs one process; packed ones last, for which verl replaces the process's attention."""
    packed = {"use_remove_padding": True}
    tool_rows = tool_data.make_sft(tmp_path_factory.mktemp("tools") / "sft.parquet", 24)
    tools = {"path": str(tiny_model_path), "data": str(tool_rows), "micro": 4, "prompt_rows": PROMPT_ROWS}
    scenarios = {
        "stock": {"stock": True},
        "zero": {"agto": {"alpha": 0.0, "beta": 0.0}},
        "measured": {"agto": {"alpha": 0.0, "beta": 0.0, "measure": True}},
        "guided": {"agto": GUIDED},
        "study": {"agto": {"alpha": 0.02, "beta": 0.0, "query_role": "response", "image_target": 0.4}},
        "micro": {"agto": GUIDED, "micro": 2},
        "checkpointing": {"agto": GUIDED, "checkpointing": True},
        "eager": {"agto": GUIDED, "attention": "eager"},
        "lora": {"agto": GUIDED, "model": LORA},
        "lora_micro": {"agto": GUIDED, "model": LORA, "micro": 2},
        "layers": {"agto": {**GUIDED, "layers": [-1], "heads": [0, 2]}},
        "target": {"agto": {**GUIDED, "warmup_steps": 0, "image_target": 1e-9, "system_floor": 0.999}},
        "visual": {"vars": {}},
        "visual_micro": {"vars": {}, "micro": 1},
        "visual_whole": {"vars": {"region": True}, "boxes": [[0, 0, 112, 112]]},
        "visual_left": {"vars": {"region": True}, "boxes": [[0, 0, 56, 112]], "micro": 2},
        "visual_right": {"vars": {"region": True}, "boxes": [[56, 0, 112, 56], [56, 56, 112, 112]]},
        "visual_lse": {"vars": {"implementation": "lse"}},
        "visual_chunked": {"vars": {"implementation": "chunked"}},
        "dependency": {"vars": DEPENDENCY},
        "dependency_micro": {"vars": DEPENDENCY, "micro": 1, "checkpointing": True},
        "dependency_alone": {"vars": {"statistic": "dependency"}, "attention": "eager"},
        "dependency_lora": {"vars": DEPENDENCY, "model": LORA},
        "swap": {"vars": {**DEPENDENCY, "corruption": "swap"}, "micro": 2},
        "stock_inference": {"vars": {"lambda_v": 0.0}},
        "tools_prompt": {"vars": DEPENDENCY, **tools},
        "tools_all": {"vars": {**DEPENDENCY, "images": "all"}, **tools},
        "tools_left": {"vars": {"region": True}, "boxes": [[0, 0, 56, 112]], **tools},
        "tools_right": {"vars": {"region": True}, "boxes": [[56, 0, 112, 112]], **tools},
        "tools_swap": {"vars": {**DEPENDENCY, "corruption": "swap"}, **tools},
        "update": {"vars": {}, "update": True},
        "grpo": {"grpo": GRPO},
        "unpacked_ulysses": {"agto": GUIDED, "engine": {"ulysses_sequence_parallel_size": 2}},
        "fsdp1": {"agto": GUIDED, "strategy": "fsdp"},
        "frozen": {"agto": GUIDED, "engine": {"freeze_vision_tower": True, "freeze_projector": True}},
        "frozen_tower": {"engine": {"freeze_vision_tower": True}},
        "frozen_lora": {
            "model": {**LORA, "target_modules": "all-linear"},
            "engine": {"freeze_vision_tower": True},
        },
        "bad_weights": {"agto": {**GUIDED, "layer_weights": [1.0, 2.0]}},
        "bad_layer": {"agto": {**GUIDED, "layers": [4]}},
        "triton": {"agto": {**GUIDED, "implementation": "triton"}},
        "packed": {"agto": GUIDED, **packed},
        "packed_micro": {"agto": GUIDED, "micro": 2, "checkpointing": True, **packed},
        "packed_dynamic": {"agto": GUIDED, "dynamic": 600, **packed},
        "packed_stock": {"stock": True, **packed},
        "packed_zero": {"agto": {"alpha": 0.0, "beta": 0.0, "measure": True}, **packed},
        "packed_visual": {"vars": {}, **packed},
        "packed_left": {"vars": {"region": True}, "boxes": [[0, 0, 56, 112]], **packed},
        "packed_lse": {"vars": {"implementation": "lse"}, **packed},
        "packed_dependency": {"vars": DEPENDENCY, **packed},
        "packed_dependency_dynamic": {"vars": DEPENDENCY, "dynamic": 600, **packed},
        "packed_swap": {"vars": {**DEPENDENCY, "corruption": "swap"}, **packed},
    }
    # Families last, and their packed ones after all others.
    for name in FAMILY_SCENARIOS:
        model_type, is_packed = name.removesuffix("_packed"), name.endswith("_packed")
        folder = tmp_path_factory.mktemp(name)
        scenarios[name] = {
            "path": str(family_path(model_type)),
            "data": str(family_data.make_sft(folder / "sft.parquet", 8, model_type)),
            "template_kwargs": SPECS[model_type].template_kwargs,
            "vars": {"statistic": "dependency"},
            "micro": 2,
            "use_remove_padding": is_packed,
        }
    return run(tmp_path_factory.mktemp("one"), tiny_model_path, data_file, scenarios)


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_model_path, data_file) -> dict:
    """Two processes on gloo: four samples each, then half of every sequence and of the heads of the attention."""
    ulysses = {"use_remove_padding": True, "engine": {"ulysses_sequence_parallel_size": 2}}
    # Packed ones last, as above.
    scenarios = {
        "guided": {"agto": GUIDED},
        "guided_micro": {"agto": GUIDED, "micro": 2},
        "grpo": {"grpo": GRPO},
        "dependency": {"vars": DEPENDENCY},
        "dependency_micro": {"vars": DEPENDENCY, "micro": 1},
        "swap": {"vars": {**DEPENDENCY, "corruption": "swap"}, "micro": 1},
        "hsdp": {"agto": GUIDED, "engine": {"fsdp_size": 1}},
        "hsdp_dependency": {"vars": DEPENDENCY, "engine": {"fsdp_size": 1}},
        "ulysses": {"agto": GUIDED, **ulysses},
        "ulysses_micro": {"agto": GUIDED, "micro": 2, "checkpointing": True, **ulysses},
        "ulysses_visual": {"vars": {}, **ulysses},
        "ulysses_dependency": {"vars": DEPENDENCY, **ulysses},
        "ulysses_heads": {"agto": {**GUIDED, "heads": [0]}, **ulysses},
    }
    return run(tmp_path_factory.mktemp("two"), tiny_model_path, data_file, scenarios, processes=2)


def assert_same_training(one: dict, other: dict, **tolerance) -> None:
    for step, (a, b) in enumerate(zip(one["metrics"], other["metrics"], strict=True)):
        for key in [key for key in a if key in ("loss", "grad_norm") or key.startswith("avar/")]:
            if key in b:
                torch.testing.assert_close(
                    torch.tensor(float(b[key])),
                    torch.tensor(float(a[key])),
                    **tolerance,
                    msg=lambda text, key=key, step=step: f"{key} at step {step}: {text}",
                )
    assert one["parameters"].keys() == other["parameters"].keys()
    for name, parameter in one["parameters"].items():
        torch.testing.assert_close(other["parameters"][name], parameter, **tolerance, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("scenario", ["zero", "measured"])
def test_zero_coefficients_are_stock_verl_to_the_bit(one, scenario):
    assert_same_training(one["stock"], one[scenario], rtol=0, atol=0)


def test_measuring_logs_masses_without_guidance(one):
    for metrics in one["measured"]["metrics"]:
        assert metrics["avar/guided_samples"] == 7  # one of eight has no image
        assert 0 < metrics["avar/image_share"] < 1
        assert metrics["avar/lm_loss"] == pytest.approx(metrics["loss"], rel=1e-6)


def test_guidance_changes_loss_and_parameters(one):
    first, second, third = one["guided"]["metrics"]
    assert first["avar/schedule"] == 0 and second["avar/schedule"] == 0.5 and third["avar/schedule"] == 1
    assert first["loss"] == pytest.approx(one["stock"]["metrics"][0]["loss"], rel=1e-6)  # warm-up starts at 0
    for metrics in (second, third):
        guidance = 0.15 * metrics["avar/enhance"] + 0.1 * metrics["avar/suppress"]
        expected = metrics["avar/lm_loss"] + metrics["avar/schedule"] * guidance
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    moved = [
        name for name, p in one["guided"]["parameters"].items() if not torch.equal(p, one["stock"]["parameters"][name])
    ]
    assert any("q_proj" in name for name in moved) and any("k_proj" in name for name in moved)


def test_targets_that_are_met_stop_the_guidance(one):
    """Every head is over an image target of 1e-9 and under a system floor of 0.999: the terms are constants."""
    for name, parameter in one["target"]["parameters"].items():
        torch.testing.assert_close(parameter, one["stock"]["parameters"][name], rtol=0, atol=0, msg=name)


def test_a_subset_of_layers_and_heads_is_another_loss(one):
    assert one["layers"]["metrics"][1]["avar/enhance"] != one["guided"]["metrics"][1]["avar/enhance"]


def test_freezing_really_freezes(one, load_tiny):
    start = dict(load_tiny().named_parameters())
    for scenario, projector_moves in (("frozen", False), ("frozen_tower", True)):
        moved = {
            name: not torch.equal(parameter, start[name]) for name, parameter in one[scenario]["parameters"].items()
        }
        for name, has_moved in moved.items():
            if name.startswith("model.visual.merger."):
                assert has_moved is projector_moves, name
            elif name.startswith("model.visual."):
                assert not has_moved, name
        assert all(has_moved for name, has_moved in moved.items() if name.startswith("model.language_model."))


@pytest.mark.parametrize("scenario", ["micro", "checkpointing", "eager"])
def test_one_process_invariance(one, scenario):
    assert_same_training(one["guided"], one[scenario], **TOLERANCE)


@pytest.mark.parametrize("scenario", ["packed", "packed_micro", "packed_dynamic"])
def test_packing_changes_nothing(one, scenario):
    assert_same_training(one["guided"], one[scenario], **TOLERANCE)


def test_adapters_are_guided_and_nothing_else_moves(one, load_tiny):
    """With LoRA the masses reach the adapters of q and k; micro-batches change nothing."""
    start = dict(load_tiny().named_parameters())
    names = one["lora"]["parameters"].keys()
    assert any("lora_A" in name for name in names)
    assert one["lora"]["metrics"][2]["avar/enhance"] != one["lora"]["metrics"][0]["avar/enhance"]
    assert_same_training(one["lora"], one["lora_micro"], **TOLERANCE)
    for name, parameter in one["lora"]["parameters"].items():
        base = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" not in name:
            torch.testing.assert_close(parameter, start[base], rtol=0, atol=0, msg=name)
    assert any(bool(p.abs().max() > 0) for name, p in one["lora"]["parameters"].items() if "lora_B" in name)


def test_no_adapter_is_trained_in_a_frozen_tower(one):
    names = [name for name in one["frozen_lora"]["parameters"] if "lora_" in name]
    assert not any("visual.blocks" in name for name in names)
    assert any("visual.merger" in name for name in names) and any("q_proj" in name for name in names)


def test_packed_zero_coefficients_are_stock_verl_to_the_bit(one):
    assert_same_training(one["packed_stock"], one["packed_zero"], rtol=0, atol=0)


def test_a_subset_of_heads_is_refused_under_sequence_parallelism(two):
    assert "a subset of heads cannot be guided under sequence parallelism" in two["ulysses_heads"]["error"]


@pytest.mark.parametrize("scenario", ["guided", "guided_micro", "hsdp", "ulysses", "ulysses_micro"])
def test_data_and_sequence_parallel_size_change_nothing(one, two, scenario):
    assert_same_training(one["guided"], two[scenario], **TOLERANCE)


def test_rewards_and_update_of_grpo_do_not_depend_on_the_number_of_processes(one, two):
    """Masses measured by two processes give the rewards and advantages of one, and these its losses and parameters."""
    expected, got = one["grpo"], two["grpo"]
    assert len(set(expected["rewards"].tolist())) > 6, "r_visual tells right answers apart"
    torch.testing.assert_close(got["rewards"], expected["rewards"], rtol=1e-5, atol=1e-6)
    for name in ("loss", "actor/pg_loss", "kl_loss", "actor/entropy_loss", "grad_norm"):
        assert got["metrics"][0][name] == pytest.approx(expected["metrics"][0][name], rel=1e-5), name
    for name, parameter in expected["parameters"].items():
        torch.testing.assert_close(
            got["parameters"][name], parameter, rtol=0, atol=2e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_an_update_before_any_measurement_is_refused(one):
    out = one["update"]
    assert out["refused"].startswith("avar.vars needs the measurements of a log-prob pass before the first update")
    assert "with lambda_v=0.3. Set trainer.v1.trainer_mode=avar_sync" in out["refused"]
    assert (out["may_update_False"], out["may_update_True"]) == (False, True)


def test_log_prob_pass_returns_a_few_numbers_a_sample(one):
    visual = one["visual"]["visual"]
    assert visual.shape == (8, len(VISUAL_FIELDS))
    fields = dict(zip(VISUAL_FIELDS, visual.unbind(1), strict=True))
    assert fields["num_image"].tolist() == [16, 16, 16, 0, 16, 16, 16, 16]
    assert bool(fields["dependency"].isnan().all())  # not asked for
    assert bool((fields["num_system"] > 0).all()) and bool((fields["num_queries"] > 20).all())
    assert fields["ratio"][3] == 0 and fields["image_share"][3] == 0  # no image, but a system turn
    assert bool((fields["image_mass"] + fields["system_mass"] <= 1).all())
    torch.testing.assert_close(one["visual_micro"]["visual"], visual, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_masses_of_rollouts_do_not_depend_on_packing_or_sequence_parallelism(one, two):
    padded = one["visual"]["visual"]
    torch.testing.assert_close(one["packed_visual"]["visual"], padded, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(two["ulysses_visual"]["visual"], padded, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_masses_of_rollouts_do_not_depend_on_the_implementation(one):
    """`lse` by name refuses a pass in which it cannot be used, so it was."""
    for visual in (one["visual_lse"], one["packed_lse"]):
        reference = one["visual_chunked"]["visual"]
        torch.testing.assert_close(visual["visual"], reference, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_masses_of_rollouts_in_a_region(one):
    """Of the whole image it is the image's; the halves of an image share its mass; packing changes nothing."""
    whole, left, right = (one[f"visual_{name}"]["visual"] for name in ("whole", "left", "right"))
    torch.testing.assert_close(whole, one["visual"]["visual"], rtol=1e-5, atol=1e-6, equal_nan=True)
    image, system, count = (VISUAL_FIELDS.index(name) for name in ("image_mass", "system_mass", "num_image"))
    torch.testing.assert_close(left[:, image] + right[:, image], whole[:, image], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(left[:, system], whole[:, system], rtol=1e-5, atol=1e-6)
    assert left[:, count].tolist() == [8, 8, 8, 0, 8, 8, 8, 8]
    assert not torch.allclose(left[:, image], right[:, image])
    torch.testing.assert_close(one["packed_left"]["visual"], left, rtol=1e-5, atol=1e-6, equal_nan=True)


def plain_image_mass(model, sample: dict, is_key_S: torch.Tensor) -> float:
    """Of the response's tokens on some keys, by transformers' eager attention alone."""
    rendered = Rendered(ids_S=sample["input_ids"], prompt_ids=[], features=sample["multi_modal_inputs"])
    with torch.no_grad():
        inputs = collate(get_family(model.config.model_type), model.config, [rendered], pad_id=0)
        attentions = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0].mean((0, 1))
    return float(attentions[sample["loss_mask"].bool()][:, is_key_S].sum(-1).mean())


def test_images_of_tools_count_where_they_are_asked_for(one, load_tiny):
    """16 tokens of the prompt's image, 16 of the one that the tool returned between two turns of the response."""
    model = load_tiny("eager")
    columns = [VISUAL_FIELDS.index(name) for name in ("num_image", "image_mass", "system_mass")]
    own, both = (one[f"tools_{name}"]["visual"][:, columns] for name in ("prompt", "all"))
    assert own[:, 0].tolist() == [16] * 8 and both[:, 0].tolist() == [32] * 8
    torch.testing.assert_close(own[:, 2], both[:, 2], rtol=1e-5, atol=1e-6)
    for row, sample in enumerate(one["tools_all"]["samples"]):
        is_image_S = sample["input_ids"] == model.config.image_token_id
        is_prompt_S = is_image_S & (is_image_S.cumsum(0) <= 16)
        assert bool((sample["loss_mask"].bool().long().argmax() > is_prompt_S.nonzero()).all())
        assert float(own[row, 1]) == pytest.approx(plain_image_mass(model, sample, is_prompt_S), rel=1e-4)
        assert float(both[row, 1]) == pytest.approx(plain_image_mass(model, sample, is_image_S), rel=1e-4)


def test_a_region_is_of_the_prompts_image(one):
    """Its halves share the mass of the prompt's image, whatever a tool returned."""
    column = VISUAL_FIELDS.index("image_mass")
    whole, left, right = (one[f"tools_{name}"]["visual"][:, column] for name in ("prompt", "left", "right"))
    torch.testing.assert_close(left + right, whole, rtol=1e-5, atol=1e-6)
    assert bool((left > 0.01).all())


def test_measuring_leaves_log_probs_alone(one):
    assert "visual" not in one["stock_inference"]
    for name in ("visual", "dependency"):
        torch.testing.assert_close(one[name]["log_probs"], one["stock_inference"]["log_probs"], rtol=0, atol=0)


def plain_dependency(model, sample: dict, corrupted: dict) -> torch.Tensor:
    """(S,) of one sample by transformers alone; 0 outside the response.

    At position t is the dependency of the token at t + 1, as in verl's log-probabilities.
    """
    ids_S, features = sample["input_ids"], sample["multi_modal_inputs"] or {}
    if not features:
        return torch.zeros(len(ids_S))

    def log_probs(features: dict) -> torch.Tensor:
        rendered = Rendered(ids_S=ids_S, prompt_ids=[], features=features)
        with torch.no_grad():
            inputs = collate(get_family(model.config.model_type), model.config, [rendered], pad_id=0)
            logits_SV = model(**inputs).logits[0]
        return logits_SV[:-1].log_softmax(-1).gather(1, ids_S[1:, None])[:, 0]

    difference = (log_probs(features) - log_probs(corrupted)).clamp(-5, 5)
    return torch.cat([difference.where(sample["loss_mask"][1:].bool(), 0.0), torch.zeros(1)])


def assert_plain_dependency(model, result: dict, corrupted: list[dict]) -> None:
    """Of every token where the engine returned them, and their mean over the response."""
    means = []
    for row, (sample, features) in enumerate(zip(result["samples"], corrupted, strict=True)):
        plain_S, response_S = plain_dependency(model, sample, features), sample["loss_mask"].roll(-1).bool()
        response_S[-1] = False
        means.append(plain_S[response_S].mean())
        if "dependency" in result:
            tokens_S = result["dependency"][row]
            torch.testing.assert_close(tokens_S[response_S], plain_S[response_S], rtol=0, atol=1e-5)
        if sample["multi_modal_inputs"]:
            assert plain_S.abs().max() > 0.01
        else:
            assert dependencies(result)[row] == 0
    torch.testing.assert_close(dependencies(result), torch.stack(means), rtol=0, atol=1e-5)


def dependencies(result: dict) -> torch.Tensor:
    return result["visual"][:, VISUAL_FIELDS.index("dependency")]


def test_dependency_is_that_of_a_plain_computation(one, load_tiny):
    samples = one["dependency"]["samples"]
    assert [bool(sample["multi_modal_inputs"]) for sample in samples] == [True] * 3 + [False] + [True] * 4
    blanked = [
        {key: torch.zeros_like(value) if key == "pixel_values" else value for key, value in features.items()}
        for features in (sample["multi_modal_inputs"] or {} for sample in samples)
    ]
    assert_plain_dependency(load_tiny("eager"), one["dependency"], blanked)
    assert not bool(one["dependency"]["dependency"][3].any())


def test_the_loops_of_the_study_have_the_numbers_of_the_engine(one, tiny_model_path):
    """Losses with and without guidance, masses and dependency, of the first batch."""
    checkpoint = Checkpoint.load(tiny_model_path)
    samples = one["dependency"]["samples"]
    rendered = [Rendered(row["input_ids"], [], row["multi_modal_inputs"] or {}) for row in samples]
    batch = loops.batch_of(checkpoint, rendered)
    for scenario, alpha in (("stock", 0.0), ("study", 0.02)):
        loss = loops.cold_start_loss(checkpoint, batch, loops.ColdStart(steps=1, alpha=alpha))
        assert float(loss) == pytest.approx(one[scenario]["metrics"][0]["loss"], rel=1e-5), scenario
    fields_BF, logs_BS = loops.measured(checkpoint, batch)
    masses = [VISUAL_FIELDS.index(name) for name in ("ratio", "image_share", "image_mass", "system_mass")]
    torch.testing.assert_close(fields_BF[:, masses], one["visual"]["visual"][:, masses], rtol=1e-4, atol=1e-6)
    found_B = loops.dependency(checkpoint, batch, logs_BS)
    torch.testing.assert_close(found_B, dependencies(one["dependency"]), rtol=0, atol=1e-5)


def test_dependency_on_a_swapped_image(one, two, load_tiny):
    """By hand: the eight images in the order of their digests; each sample sees the next one."""
    images = [sample["multi_modal_inputs"] or {} for sample in one["swap"]["samples"]]
    order = sorted((i for i in range(8) if images[i]), key=lambda i: sha256(images[i]["pixel_values"].numpy()).digest())
    swapped = [{} for _ in images]
    for index, other in zip(order, order[1:] + order[:1], strict=True):
        swapped[index] = {**images[index], "pixel_values": images[other]["pixel_values"]}
    assert_plain_dependency(load_tiny("eager"), one["swap"], swapped)
    torch.testing.assert_close(dependencies(two["swap"]), dependencies(one["swap"])[::2], rtol=0, atol=1e-5)
    torch.testing.assert_close(dependencies(one["packed_swap"]), dependencies(one["swap"]), rtol=0, atol=1e-5)


def test_dependency_on_the_images_of_the_prompt(one, load_tiny):
    """Those that a tool returned stay, unless all images count; swapped are those of the prompts."""
    model, samples = load_tiny("eager"), one["tools_prompt"]["samples"]
    features = [sample["multi_modal_inputs"] for sample in samples]

    def with_pixels(own: dict, first: torch.Tensor) -> dict:
        return {**own, "pixel_values": torch.cat([first, own["pixel_values"][64:]])}

    assert_plain_dependency(model, one["tools_prompt"], [with_pixels(own, torch.zeros(64, 1176)) for own in features])
    assert_plain_dependency(model, one["tools_all"], [blank(own) for own in features])
    order = sorted(range(8), key=lambda i: sha256(features[i]["pixel_values"][:64].numpy()).digest())
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    swapped = [with_pixels(own, features[following[i]]["pixel_values"][:64]) for i, own in enumerate(features)]
    assert_plain_dependency(model, one["tools_swap"], swapped)


@pytest.mark.parametrize("scenario", FAMILY_SCENARIOS)
def test_dependency_of_every_family(one, family_path, scenario):
    """Two samples a micro-batch: one or two images beside text alone."""
    path = family_path(scenario.removesuffix("_packed"))
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()
    family = get_family(model.config.model_type)
    if family.prepare is not None:
        family.prepare(model)
    result = one[scenario]
    assert_plain_dependency(model, result, [blank(sample["multi_modal_inputs"]) for sample in result["samples"]])
    assert [bool(sample["multi_modal_inputs"]) for sample in result["samples"]] == [True, False] * 4


@pytest.mark.parametrize(
    "scenario",
    ["dependency_micro", "dependency_alone", "packed_dependency", "packed_dependency_dynamic", "dependency_lora"],
)
def test_dependency_does_not_depend_on_the_layout(one, scenario):
    """New adapters of LoRA change nothing either."""
    torch.testing.assert_close(dependencies(one[scenario]), dependencies(one["dependency"]), rtol=0, atol=1e-5)
    assert dependencies(one[scenario])[3] == 0


@pytest.mark.parametrize("scenario", ["dependency", "dependency_micro", "hsdp_dependency", "ulysses_dependency"])
def test_dependency_does_not_depend_on_the_number_of_processes(one, two, scenario):
    """The first process has every other sample, or under sequence parallelism all. The one without an image is the
    other's: in micro-batches of one, its own forward pass has no image while the first's has one.
    """
    expected = one["dependency"] if "ulysses" in scenario else {"visual": one["dependency"]["visual"][::2]}
    torch.testing.assert_close(two[scenario]["visual"], expected["visual"], rtol=1e-5, atol=1e-5)


def test_dependency_is_measured_without_masses(one):
    """Then these are not captured, and token weights that nobody asked for are not returned."""
    fields = dict(zip(VISUAL_FIELDS, one["dependency_alone"]["visual"].unbind(1), strict=True))
    assert all(bool(fields[name].isnan().all()) for name in MASS_FIELDS)
    assert "dependency" not in one["dependency_alone"] and "dependency" in one["dependency"]


@pytest.mark.parametrize(
    "scenario, message",
    [
        ("unpacked_ulysses", "sequence parallelism needs packed micro-batches"),
        ("fsdp1", "FSDP1 needs an accelerator"),
        ("bad_weights", "layer_weights must have one weight per layer; got 2 for 4 layers"),
        ("bad_layer", "layers must be distinct indices among the 4"),
        ("triton", "the Triton kernel needs a CUDA device"),
    ],
)
def test_what_cannot_work_is_refused_before_training(one, scenario, message):
    assert message in one[scenario]["error"]
