# SPDX-License-Identifier: Apache-2.0
"""The `avar` node: yaml and dataclasses agree, every rule is enforced, the recipes compose on every machine."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from avar_verl.config import AgtoConfig, AvarConfig, VarsConfig

CONFIG_DIR = Path(__file__).parents[1] / "recipes" / "avar" / "config"


def recipe(name: str, *overrides: str):
    """Compose a recipe; it names verl's configs by package, so nothing depends on the working directory."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        return compose(name, overrides=list(overrides))


@pytest.mark.parametrize("node, config", [("agto", AgtoConfig), ("vars", VarsConfig)])
def test_yaml_and_dataclass_agree(node, config):
    text = yaml.safe_load((CONFIG_DIR / "avar" / "avar.yaml").read_text())[node]
    assert text.pop("_target_") == f"avar_verl.config.{config.__name__}"
    assert text == {field.name: getattr(config(), field.name) for field in dataclasses.fields(config)}


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_coefficient_is_explained_above_it(path):
    lines = path.read_text().splitlines()
    if path.parent.name == "avar":
        for number, line in enumerate(lines):
            if line.startswith("  ") and ":" in line and not line.strip().startswith(("#", "_target_")):
                assert lines[number - 1].strip().startswith("#"), f"{path.name}:{number + 1} has no comment above"
    assert not any(line.split("#")[0].strip() and "#" in line for line in lines if "://" not in line), (
        "trailing comment"
    )


@pytest.mark.parametrize(
    "config, values, message",
    [
        (AgtoConfig, {"alpha": -0.1}, "alpha must be >= 0; got -0.1"),
        (AgtoConfig, {"beta": -1}, "beta must be >= 0"),
        (AgtoConfig, {"epsilon": -1e-9}, "epsilon must be >= 0"),
        (AgtoConfig, {"query_role": "image"}, "query_role must be one of"),
        (AgtoConfig, {"image_target": 0.0}, r"image_target must be null or in \(0, 1\]"),
        (AgtoConfig, {"image_target": 1.1}, "image_target must be"),
        (AgtoConfig, {"system_floor": 1.0}, r"system_floor must be null or in \[0, 1\)"),
        (AgtoConfig, {"warmup_steps": -1}, "warmup_steps must be >= 0"),
        (AgtoConfig, {"layers": "0,1"}, "layers must be null or a non-empty list"),
        (AgtoConfig, {"layers": []}, "layers must be null or a non-empty list"),
        (AgtoConfig, {"heads": [0.5]}, "heads must be null or a non-empty list"),
        (AgtoConfig, {"anneal": [5, 5]}, "anneal must be"),
        (AgtoConfig, {"anneal": [1, 5], "warmup_steps": 2}, "warmup_steps <= first < last"),
        (VarsConfig, {"lambda_v": -0.3}, "lambda_v must be >= 0"),
        (VarsConfig, {"epsilon": 0.0}, "epsilon must be > 0"),
        (VarsConfig, {"statistic": "vas"}, "statistic must be one of"),
        (VarsConfig, {"shaping": "tanh"}, "shaping must be one of"),
        (VarsConfig, {"shaping": "clip"}, "shaping=clip needs clip_max > 0"),
        (VarsConfig, {"shaping": "clip", "clip_max": 0.0}, "shaping=clip needs clip_max > 0"),
        (VarsConfig, {"clip_max": 3.0}, "clip_max has an effect under shaping=clip alone"),
        (VarsConfig, {"layers": [True]}, "layers must be null or a non-empty list"),
    ],
)
def test_every_rule_is_enforced(config, values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_defaults_are_the_papers():
    config = AvarConfig()
    assert (config.agto.alpha, config.agto.beta, config.vars.lambda_v) == (0.15, 0.15, 0.3)
    assert config.agto.guides and config.vars.measures
    assert not AgtoConfig(alpha=0, beta=0).guides and not VarsConfig(lambda_v=0).measures
    assert VarsConfig(lambda_v=0, measure=True).measures


@pytest.mark.parametrize("machine", ["gpu_sft", "cpu_sft"])
def test_cold_start_recipe(machine):
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import FSDPEngineConfig

    config = recipe("avar_sft", f"machine={machine}", "avar.agto.layers=[0,2]", "data.train_files=x")
    engine = omega_conf_to_dataclass(config.engine)
    assert isinstance(engine, FSDPEngineConfig) and engine.strategy == "fsdp2" and engine.vars is None
    assert engine.agto == AgtoConfig(layers=[0, 2])
    assert config.model.use_remove_padding is False and config.data.train_batch_size == 512
    assert config.optim.lr == 5e-6 and "hf_model" in config.checkpoint.save_contents
    omega_conf_to_dataclass(config.optim)
    omega_conf_to_dataclass(config.checkpoint)


@pytest.mark.parametrize("machine, gpus, nodes", [("gpu_grpo", 8, 2), ("cpu_grpo", 1, 1)])
def test_grpo_recipe(machine, gpus, nodes, tiny_model_path):
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    from avar_verl.trainer.grpo import check_grpo_config

    config = recipe(
        "avar_grpo",
        f"machine={machine}",
        f"actor_rollout_ref.model.path={tiny_model_path}",
        f"trainer.n_gpus_per_node={gpus}",
        f"trainer.nnodes={nodes}",
    )
    OmegaConf.resolve(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.engine.vars == VarsConfig() and actor.engine.agto is None and actor.engine.strategy == "fsdp2"
    assert config.trainer.v1.trainer_mode == "avar_sync"
    assert config.reward.custom_reward_function.path == "pkg://reward_fns.avar"
    check_grpo_config(config, omega_conf_to_dataclass(config.avar.vars))
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["actor_rollout_ref.actor.fsdp_config.vars=null"], "measured by the actor's engine"),
        (["algorithm.rollout_correction.bypass_mode=true"], "which skips that pass"),
        (["algorithm.filter_groups.enable=true"], "filtering happens before r_visual is known"),
    ],
)
def test_grpo_configs_that_cannot_be_right_are_refused(overrides, message):
    from avar_verl.trainer.grpo import check_grpo_config

    config = recipe("avar_grpo", "machine=cpu_grpo", *overrides)
    with pytest.raises(ValueError, match=message):
        check_grpo_config(config, VarsConfig())
    check_grpo_config(config, VarsConfig(lambda_v=0))  # nothing to measure, nothing to refuse
