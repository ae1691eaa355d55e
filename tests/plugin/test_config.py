# SPDX-License-Identifier: Apache-2.0
"""The `avar` node: yaml and dataclasses agree, every rule is enforced, the recipes compose on every machine."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from avar_verl.attention.mass import IMPLEMENTATIONS
from avar_verl.objectives.vars import SHAPINGS, STATISTICS
from avar_verl.plugin.config import (
    ADVANTAGES,
    DROP_GROUPS,
    QUERY_ROLES,
    AgtoConfig,
    AvarConfig,
    RewardManagerConfig,
    TrainerConfig,
    VarsConfig,
)

CONFIG_DIR = Path(__file__).parents[2] / "recipes" / "avar" / "config"
PAPER_GRPO = ("trainer.n_gpus_per_node=8", "trainer.nnodes=2")


def recipe(name: str, *overrides: str):
    """Compose a recipe as verl's launchers do with --config-dir: their own folder first, ours in front of it.

    The steps of hydra/_internal/utils.py `_run_hydra`.
    """
    search_path = create_config_search_path("pkg://verl.trainer.config")
    search_path.prepend("command-line", f"file://{CONFIG_DIR}", SearchPathQuery(provider="schema"))
    Hydra.create_main_hydra2("test", search_path)
    try:
        return compose(name, overrides=list(overrides))
    finally:
        GlobalHydra.instance().clear()


NODES = {"agto": AgtoConfig, "vars": VarsConfig, "reward": RewardManagerConfig, "trainer": TrainerConfig}


@pytest.mark.parametrize("node, config", NODES.items())
def test_yaml_and_dataclass_agree(node, config):
    text = yaml.safe_load((CONFIG_DIR / "avar" / "avar.yaml").read_text())[node]
    assert text.pop("_target_") == f"avar_verl.plugin.config.{config.__name__}"
    assert text == {field.name: getattr(config(), field.name) for field in dataclasses.fields(config)}
    types = {name: type(value) for name, value in text.items()}
    assert types == {field.name: type(getattr(config(), field.name)) for field in dataclasses.fields(config)}


def test_the_yaml_has_the_nodes_of_the_dataclass():
    text = yaml.safe_load((CONFIG_DIR / "avar" / "avar.yaml").read_text())
    assert text.pop("_target_") == "avar_verl.plugin.config.AvarConfig"
    assert text.pop("defaults") == ["/switch/avar", "_self_"]
    assert text["family"] == AvarConfig().family
    assert list(text) == [field.name for field in dataclasses.fields(AvarConfig)]


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_field_is_explained_above_it(path):
    lines = path.read_text().splitlines()
    if path.parent.name == "avar":
        fields = [
            number
            for number, line in enumerate(lines)
            if ":" in line and not line.strip().startswith(("#", "_target_", "defaults"))
        ]
        assert len(fields) == 43
        for number in fields:
            assert lines[number - 1].strip().startswith("#"), f"{path.name}:{number + 1} has no comment above"
    trailing = [line for line in lines if line.split("#")[0].strip() and "#" in line]
    assert not trailing, "comments stand above their field"


@pytest.mark.parametrize("config", [*NODES.values(), AvarConfig])
def test_every_field_has_a_string_under_it(config):
    body = ast.parse(inspect.getsource(config)).body[0].body
    explained = {
        field.target.id
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    assert explained == {field.name for field in dataclasses.fields(config)}


NAN = float("nan")


@pytest.mark.parametrize(
    "config, values, message",
    [
        (AgtoConfig, {"alpha": -0.1}, "alpha must be >= 0; got -0.1"),
        (AgtoConfig, {"alpha": NAN}, "alpha must be >= 0; got nan"),
        (AgtoConfig, {"beta": -1}, "beta must be >= 0; got -1"),
        (AgtoConfig, {"epsilon": -1e-9}, "epsilon must be >= 0; got -1e-09"),
        (AgtoConfig, {"query_role": "image"}, r"query_role must be one of \['both', 'response', 'user'\]; got 'image'"),
        (AgtoConfig, {"image_target": 0.0}, r"image_target must be null or in \(0, 1\]; got 0.0"),
        (AgtoConfig, {"image_target": 1.1}, r"image_target must be null or in \(0, 1\]; got 1.1"),
        (AgtoConfig, {"system_floor": 1.0}, r"system_floor must be null or in \[0, 1\); got 1.0"),
        (AgtoConfig, {"system_floor": -0.1}, r"system_floor must be null or in \[0, 1\); got -0.1"),
        (AgtoConfig, {"warmup_steps": -1}, "warmup_steps must be >= 0; got -1"),
        (AgtoConfig, {"layers": "0,1"}, "layers must be null or a non-empty list of integers; got '0,1'"),
        (AgtoConfig, {"layers": []}, r"layers must be null or a non-empty list of integers; got \[\]"),
        (AgtoConfig, {"heads": [0.5]}, r"heads must be null or a non-empty list of integers; got \[0.5\]"),
        (AgtoConfig, {"anneal": [5, 5]}, r"anneal must be \[first, last\] with .*; got \(5, 5\)"),
        (AgtoConfig, {"anneal": [5]}, r"anneal must be \[first, last\]"),
        (AgtoConfig, {"anneal": [1, 2, 3]}, r"anneal must be \[first, last\]"),
        (AgtoConfig, {"anneal": "1,2"}, "anneal must be null or a non-empty list of integers"),
        (AgtoConfig, {"anneal": [-1, 5]}, ".*warmup_steps <= first < last"),
        (AgtoConfig, {"anneal": [1, 5], "warmup_steps": 2}, ".*warmup_steps <= first < last"),
        (VarsConfig, {"lambda_v": -0.3}, "lambda_v must be >= 0; got -0.3"),
        (VarsConfig, {"epsilon": 0.0}, "epsilon must be > 0; got 0.0"),
        (
            VarsConfig,
            {"statistic": "vas"},
            r"statistic must be one of \('ratio', 'image_share', 'dependency'\); got 'vas'",
        ),
        (VarsConfig, {"advantage": "total"}, r"advantage must be one of \('sum_then_normalize', .*\); got 'total'"),
        (VarsConfig, {"drop_groups": "easy"}, r"drop_groups must be one of \('identical', 'all_wrong'\); got 'easy'"),
        (VarsConfig, {"shaping": "tanh"}, "shaping must be one of .*; got 'tanh'"),
        (VarsConfig, {"shaping": "clip"}, "shaping=clip needs clip_max > 0; got None"),
        (VarsConfig, {"shaping": "clip", "clip_max": 0.0}, "shaping=clip needs clip_max > 0; got 0.0"),
        (VarsConfig, {"images": "none"}, r"images must be one of \('prompt', 'all'\); got 'none'"),
        (VarsConfig, {"images": "all", "region": True}, "region is of the prompt's image; got 'images=all'"),
        (
            VarsConfig,
            {"images": "all", "corruption": "swap", "measure_dependency": True},
            "only the prompt's images can be swapped, .*; got 'images=all'. Set avar.vars.images=prompt, or",
        ),
        (VarsConfig, {"clip_max": 3.0}, "clip_max needs shaping=clip; got"),
        (
            AgtoConfig,
            {"layer_weights": [1.0, 0.0]},
            r"layer_weights must be null or positive numbers; got \[1.0, 0.0\]",
        ),
        (AgtoConfig, {"layer_weights": []}, r"layer_weights must be null or positive numbers; got \[\]"),
        (AgtoConfig, {"layer_weights": [1.0], "layers": [0, 1]}, "layer_weights must have one weight per layer; got"),
        (AgtoConfig, {"alarm_system_mass": 1.0}, r"alarm_system_mass must be in \[0, 1\); got 1.0"),
        (VarsConfig, {"layer_weights": "12"}, "layer_weights must be null or positive numbers; got '12'"),
        (VarsConfig, {"alarm_system_mass": -0.1}, r"alarm_system_mass must be in \[0, 1\); got -0.1"),
        (VarsConfig, {"alarm_window": 1}, "alarm_window must be 0 or >= 2; got 1"),
        (AgtoConfig, {"implementation": "eager"}, "implementation must be one of .*; got 'eager'"),
        (VarsConfig, {"implementation": "flash"}, "implementation must be one of .*; got 'flash'"),
        (RewardManagerConfig, {"skip_special_tokens": "no"}, "skip_special_tokens must be true or false; got 'no'"),
        (RewardManagerConfig, {"timeout_s": 0}, "timeout_s must be null or > 0; got 0"),
        (RewardManagerConfig, {"max_failures": 0}, "max_failures must be >= 1; got 0"),
        (TrainerConfig, {"poll_interval_s": 0}, "poll_interval_s must be null or > 0; got 0"),
        (TrainerConfig, {"poll_interval_s": NAN}, "poll_interval_s must be null or > 0; got nan"),
        (VarsConfig, {"measure_dependency": 1}, "measure_dependency must be true or false; got 1"),
        (VarsConfig, {"corruption": "noise"}, r"corruption must be one of \('blank', 'swap'\); got 'noise'"),
        (VarsConfig, {"corruption": "swap"}, "corruption needs a measured dependency; got 'swap'"),
        (
            VarsConfig,
            {"corruption": "swap", "statistic": "dependency", "lambda_v": 0.0},
            "corruption needs a measured dependency; got 'swap'",
        ),
        (VarsConfig, {"token_weights": "entropy"}, r"token_weights must be one of \('none', 'dependency'\); got 'ent"),
        (
            VarsConfig,
            {"statistic": "dependency", "shaping": "log"},
            r"shaping=log needs a statistic >= 0, which the dependency is not; got \('dependency', 'log'\)",
        ),
        *(
            (
                VarsConfig,
                {"statistic": "dependency", **values},
                rf"some settings are of attention masses, .*statistic=dependency.*; got \{{'{next(iter(values))}'",
            )
            for values in (
                {"region": True},
                {"layers": [0]},
                {"layer_weights": [1.0]},
                {"epsilon": 1e-3},
                {"alarm_system_mass": 0.0},
                {"implementation": "lse"},
            )
        ),
        (VarsConfig, {"region": "left"}, "region must be true or false; got 'left'"),
        (VarsConfig, {"layers": [True]}, r"layers must be null or a non-empty list of integers; got \[True\]"),
    ],
)
def test_every_rule_is_enforced(config, values, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        config(**values)
    assert "Set avar." in str(error.value) or "Use null for all of them." in str(error.value)


@pytest.mark.parametrize(
    "config, values",
    [
        *((AgtoConfig, {"query_role": role}) for role in QUERY_ROLES),
        (AgtoConfig, {"alpha": 0, "beta": 0, "epsilon": 0, "image_target": 1, "system_floor": 0}),
        (AgtoConfig, {"warmup_steps": 2, "anneal": [2, 3], "layers": [-1], "heads": [0, 3]}),
        (AgtoConfig, {"layers": [0, 2], "layer_weights": [1.0, 0.5], "alarm_system_mass": 0}),
        (VarsConfig, {"alarm_window": 0, "layer_weights": (2.0,)}),
        *((VarsConfig, {"statistic": statistic}) for statistic in STATISTICS),
        *((VarsConfig, {"shaping": shaping}) for shaping in SHAPINGS if shaping != "clip"),
        *((VarsConfig, {"advantage": name}) for name in ADVANTAGES),
        *((VarsConfig, {"drop_groups": name}) for name in DROP_GROUPS),
        (VarsConfig, {"shaping": "clip", "clip_max": 20, "layers": (0, -1)}),
        (VarsConfig, {"statistic": "dependency", "measure": True, "layers": (0,), "region": True}),
        (VarsConfig, {"statistic": "dependency", "corruption": "swap", "shaping": "rank"}),
        (VarsConfig, {"lambda_v": 0, "measure_dependency": True, "corruption": "swap"}),
        (VarsConfig, {"token_weights": "dependency", "corruption": "swap", "lambda_v": 0}),
        (RewardManagerConfig, {"skip_special_tokens": False, "timeout_s": None, "max_failures": 1}),
        (TrainerConfig, {"poll_interval_s": None}),
        *((config, {"implementation": name}) for config in (AgtoConfig, VarsConfig) for name in IMPLEMENTATIONS),
    ],
)
def test_the_edges_of_the_rules_are_allowed(config, values):
    made = config(**values)
    for name, value in values.items():
        assert getattr(made, name) == (tuple(value) if isinstance(value, list) else value)


def test_configs_are_frozen_and_named():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AgtoConfig().alpha = 1.0
    with pytest.raises(TypeError):
        AgtoConfig(0.15)


def test_defaults_are_the_papers():
    config = AvarConfig()
    assert (config.agto.alpha, config.agto.beta, config.agto.epsilon) == (0.15, 0.15, 1e-6)
    assert (config.vars.lambda_v, config.vars.statistic, config.vars.shaping) == (0.3, "ratio", "none")
    assert config.agto.layers is config.agto.heads is config.vars.layers is None


@pytest.mark.parametrize(
    "values, guides", [({}, True), ({"alpha": 0}, True), ({"beta": 0}, True), ({"alpha": 0, "beta": 0}, False)]
)
def test_what_guides(values, guides):
    assert AgtoConfig(**values).guides is guides


@pytest.mark.parametrize("lambda_v, measure, measures", [(0.3, False, True), (0, False, False), (0, True, True)])
def test_what_measures(lambda_v, measure, measures):
    assert VarsConfig(lambda_v=lambda_v, measure=measure).measures is measures


@pytest.mark.parametrize(
    "values, masses, dependency",
    [
        ({}, True, False),
        ({"measure_dependency": True}, True, True),
        ({"token_weights": "dependency"}, True, True),
        ({"statistic": "dependency"}, False, True),
        ({"statistic": "dependency", "measure": True}, True, True),
        ({"statistic": "dependency", "lambda_v": 0}, False, False),
        ({"statistic": "dependency", "lambda_v": 0, "measure": True}, True, True),
        ({"lambda_v": 0, "measure_dependency": True}, False, True),
    ],
)
def test_what_is_measured(values, masses, dependency):
    config = VarsConfig(**values)
    assert (config.measures_masses, config.measures_dependency) == (masses, dependency)
    assert config.measures is (masses or dependency) and config.swaps is False
    assert config.measures_statistic is (dependency if config.statistic == "dependency" else masses)
    if dependency:
        assert VarsConfig(**values, corruption="swap").swaps is True


@pytest.mark.parametrize("machine", ["gpu_sft", "cpu_sft"])
def test_cold_start_recipe(machine):
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import FSDPEngineConfig

    from avar_verl.plugin.engine.config import AvarFSDPEngineConfig

    overrides = ["avar.agto.layers=[0,2]", "avar.agto.anneal=[3,5]", "avar.vars.lambda_v=0", "data.train_files=x"]
    config = recipe("avar_sft", f"machine={machine}", *overrides)
    engine = omega_conf_to_dataclass(config.engine)
    assert type(engine) is AvarFSDPEngineConfig and isinstance(engine, FSDPEngineConfig)
    assert engine.strategy == "fsdp2" and engine.vars is None
    assert engine.agto == AgtoConfig(layers=[0, 2], anneal=[3, 5])
    avar = omega_conf_to_dataclass(config.avar)
    assert avar == AvarConfig(agto=engine.agto, vars=VarsConfig(lambda_v=0))
    assert config.model.use_remove_padding is True and config.data.train_batch_size == 512
    assert config.optim.lr == 5e-6 and "hf_model" in config.checkpoint.save_contents
    assert config.trainer.device == ("cpu" if machine == "cpu_sft" else "cuda")
    omega_conf_to_dataclass(config.optim)
    omega_conf_to_dataclass(config.checkpoint)


def test_an_invalid_value_on_the_command_line_is_refused_when_the_node_is_built():
    from hydra.errors import InstantiationException
    from verl.utils.config import omega_conf_to_dataclass

    config = recipe("avar_sft", "avar.agto.alpha=-1")
    for node in (config.avar, config.engine):
        with pytest.raises(InstantiationException, match="alpha must be >= 0; got -1"):
            omega_conf_to_dataclass(node)


@pytest.mark.parametrize("machine, overrides", [("gpu_grpo", PAPER_GRPO), ("cpu_grpo", ())])
def test_grpo_recipe(machine, overrides, tiny_model_path):
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    from avar_verl.plugin.engine.config import AvarFSDPEngineConfig
    from avar_verl.plugin.refusals import check_grpo_config

    path = f"actor_rollout_ref.model.path={tiny_model_path}"
    config = recipe("avar_grpo", f"machine={machine}", path, *overrides)
    OmegaConf.resolve(config)
    validate_config(config, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert type(actor.engine) is AvarFSDPEngineConfig
    assert actor.engine.vars == VarsConfig() and actor.engine.agto is None and actor.engine.strategy == "fsdp2"
    assert omega_conf_to_dataclass(config.avar) == AvarConfig()
    assert config.trainer.v1.trainer_mode == "avar_sync"
    assert config.reward.custom_reward_function.path == "pkg://reward_fns.avar"
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop == "avar_single_turn"
    assert config.reward.reward_manager.name == "avar"
    assert config.actor_rollout_ref.model.use_remove_padding is True
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6 and config.actor_rollout_ref.rollout.n == 8
    check_grpo_config(config, omega_conf_to_dataclass(config.avar.vars))
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)


def test_one_override_reaches_trainer_and_engine(tiny_model_path):
    from verl.utils.config import omega_conf_to_dataclass

    changes = ["avar.vars.shaping=clip", "avar.vars.clip_max=20", "avar.vars.layers=[-1]"]
    config = recipe("avar_grpo", "machine=cpu_grpo", *changes)
    expected = VarsConfig(shaping="clip", clip_max=20, layers=[-1])
    assert omega_conf_to_dataclass(config.avar.vars) == expected
    assert omega_conf_to_dataclass(config.actor_rollout_ref.actor).engine.vars == expected


@pytest.mark.parametrize("name, machine", [("avar_sft", "cpu_sft"), ("avar_grpo", "cpu_grpo")])
def test_recipes_compose_from_their_own_folder(name, machine):
    """They name verl's configs by package, so a script may also give our folder as the only one."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        alone = compose(name, overrides=[f"machine={machine}"])
    assert alone == recipe(name, f"machine={machine}")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["actor_rollout_ref.actor.fsdp_config.vars=null"], "measured by the actor's engine"),
        (["algorithm.filter_groups.enable=true"], "filtering happens before r_visual is known"),
    ],
)
def test_grpo_configs_that_cannot_be_right_are_refused(overrides, message):
    from avar_verl.plugin.refusals import check_grpo_config

    config = recipe("avar_grpo", "machine=cpu_grpo", *overrides)
    with pytest.raises(ValueError, match=message):
        check_grpo_config(config, VarsConfig())
    check_grpo_config(config, VarsConfig(lambda_v=0))  # nothing to measure, nothing to refuse
