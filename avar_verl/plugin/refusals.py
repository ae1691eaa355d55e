# SPDX-License-Identifier: Apache-2.0
"""What a run refuses before verl starts anything, decided from the composed config.

1. Settings of `avar` that the chosen launcher, trainer or engine would train without.
2. Batches that verl's workers refuse in the middle of the first step, minutes later.
3. Settings on the command line that this stage does not read.

`plugin.hydra.SwitchOn` calls `check_run` for every run whose config names avar, our trainers call `check_grpo`,
and `AvarFSDPEngine` refuses to update before it has measured, whatever started it.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from avar_verl.plugin.config import STRATEGIES, AvarConfig, RewardManagerConfig, TrainerConfig, VarsConfig
from avar_verl.plugin.switch import REWARD_MANAGER_NAME, TOOL_AGENT_NAME, TRAINER_NAMES

# Launchers by their file in verl's package. Others of verl train with trainers that never call this plugin.
GRPO_LAUNCHERS = ("trainer/main_ppo.py",)
SFT_LAUNCHERS = ("trainer/sft_trainer.py", "trainer/sft_trainer_ray.py")
NOT_TRAINING = ("trainer/main_generation_server.py", "trainer/main_eval.py")
# The estimators that divide by the standard deviation of the group, as r_visual's own part is.
ESTIMATORS = ("grpo", "grpo_vectorized")
# Estimators that read what verl's V1 trainer does not fetch (trainer_base.py:1745): it fails in the first step.
NOT_IN_V1 = {
    "gdpo": "prompts",
    "remax": "reward_baselines",
    "optimal_token_baseline": "sum_pi_squared",
    "tir_optimal_token_baseline": "sum_pi_squared",
}
# What makes a stage do more than verl does, with the value that switches it off.
AGTO_OFF = {"alpha": 0, "beta": 0, "measure": False}
VARS_OFF = {"lambda_v": 0, "measure": False, "measure_dependency": False, "token_weights": "none"}
# Its class, whose rollouts share the pixels of their prompt.
MANAGER = "avar_verl.plugin.rollout.worker.AvarAgentLoopManager"
FREEZES = {"freeze_vision_tower": False, "freeze_projector": False}


def _text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _wanted(prefix: str, node, off: dict) -> dict[str, tuple]:
    """The switches of `node` that are on: {"avar.vars.lambda_v": (0.3, 0)}."""
    values = {name: getattr(node, name) for name in off}
    return {f"{prefix}.{name}": (value, off[name]) for name, value in values.items() if value != off[name]}


def _refuse(wanted: dict[str, tuple], rule: str, got: str, fix: str) -> None:
    """Raise the error of settings that something would train without, with both ways out."""
    on = ", ".join(f"{name}={_text(value)}" for name, (value, _) in wanted.items())
    off = " ".join(f"{name}={_text(value)}" for name, (_, value) in wanted.items())
    raise ValueError(f"{on} {rule}; got {got}. {fix} To run without: {off}.")


# ---- GRPO ---------------------------------------------------------------------------------------------------------


def check_drop_groups(config: DictConfig, vars_config: VarsConfig) -> None:
    """Refuse configs in which `avar.vars.drop_groups` has no effect or contradicts verl's filter.

    Raises:
        ValueError: names the field and the value to set.
    """
    if vars_config.drop_groups == "identical":
        return
    filter_groups = config.algorithm.get("filter_groups")
    if not (filter_groups and filter_groups.enable):
        raise ValueError(
            f"groups are dropped by verl's filter; got avar.vars.drop_groups={vars_config.drop_groups} with "
            "algorithm.filter_groups.enable=False. Set it to True, with algorithm.filter_groups.metric="
            f"{vars_config.gate_key}, or set avar.vars.drop_groups=identical."
        )
    if filter_groups.metric != vars_config.gate_key:
        raise ValueError(
            f"avar.vars.drop_groups={vars_config.drop_groups} asks the gate which answers are wrong; got "
            f"algorithm.filter_groups.metric={filter_groups.metric!r}. Set it to {vars_config.gate_key}."
        )
    custom = config.trainer.v1.sampler.get("custom_sampler")
    if custom and custom.get("path"):
        raise ValueError(
            "a custom sampler has its own filter; got trainer.v1.sampler.custom_sampler.path="
            f"{custom.path!r} with avar.vars.drop_groups={vars_config.drop_groups}. Set one of the two."
        )


def check_advantage(config: DictConfig, vars_config: VarsConfig) -> None:
    """Refuse `normalize_then_sum` with an advantage that is not normalised by the group.

    Without the division by the standard deviation both orders give the same numbers, and an advantage with a baseline
    or a normalisation of another kind has no part to which a group-relative one can be added.

    Raises:
        ValueError: names the field and the value to set.
    """
    if vars_config.advantage != "normalize_then_sum":
        return
    fix = "Set avar.vars.advantage=sum_then_normalize, or the estimator to grpo."
    estimator = config.algorithm.adv_estimator
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"normalize_then_sum needs algorithm.adv_estimator in {ESTIMATORS}; got {str(estimator)!r}. {fix}"
        )
    if not config.algorithm.get("norm_adv_by_std_in_grpo", True):
        raise ValueError(
            "normalize_then_sum divides by standard deviations; got algorithm.norm_adv_by_std_in_grpo=False, with "
            "which a sum keeps the weight of each part. Set avar.vars.advantage=sum_then_normalize."
        )


def bypasses(config: DictConfig) -> bool:
    """Whether verl takes the rollouts' log-probabilities for old_log_probs, without a pass of the actor."""
    correction = config.algorithm.get("rollout_correction")
    return bool(correction and correction.get("bypass_mode", False))


def check_grpo_config(config: DictConfig, vars_config: VarsConfig) -> None:
    """Refuse configs of our trainers that would make VARS wrong.

    Raises:
        ValueError: names the field and the value to set.
    """
    check_drop_groups(config, vars_config)
    check_advantage(config, vars_config)
    if not vars_config.measures:
        return
    if config.actor_rollout_ref.actor.fsdp_config.get("vars") is None:
        raise ValueError(
            "VARS is measured by the actor's engine; got actor_rollout_ref.actor.fsdp_config.vars=null. Start from "
            "avar_grpo.yaml, which sets fsdp_config._target_ and fsdp_config.vars."
        )
    filter_groups = config.algorithm.get("filter_groups")
    if filter_groups and filter_groups.enable and vars_config.lambda_v > 0 and filter_groups.metric == "reward":
        raise ValueError(
            "group filtering happens before r_visual is known; got algorithm.filter_groups.metric='reward' with "
            f"lambda_v={vars_config.lambda_v}. Filter on the gate: "
            f"algorithm.filter_groups.metric={vars_config.gate_key}."
        )


def _is_avar_trainer(name: str) -> bool:
    if name in TRAINER_NAMES or name in TRAINER_NAMES.values():
        return name in TRAINER_NAMES.values()
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    ours = tuple(TRAINER_REGISTRY[own] for own in TRAINER_NAMES.values())
    return name in TRAINER_REGISTRY and issubclass(TRAINER_REGISTRY[name], ours)


def _check_trainer(config: DictConfig, wanted: dict[str, tuple]) -> None:
    if not wanted:
        return
    if not config.trainer.use_v1:
        _refuse(wanted, "needs verl's V1 trainer", "trainer.use_v1=false", "Set trainer.use_v1=true.")
    mode = config.trainer.v1.trainer_mode
    if not _is_avar_trainer(mode):
        got = f"trainer.v1.trainer_mode={mode}, which trains without"
        ours = TRAINER_NAMES.get(mode, TRAINER_NAMES["sync"])
        _refuse(wanted, "needs an avar trainer or a subclass of one", got, f"Set trainer.v1.trainer_mode={ours}.")


def _check_engine(path: str, engine: DictConfig, strategy: tuple[str, str], wanted: dict[str, tuple]) -> None:
    """`strategy`: name and value of the setting that chooses the engine."""
    if not wanted:
        return
    name, value = strategy
    if value not in STRATEGIES:
        got = f"{name}={value}, whose engine trains without"
        _refuse(wanted, f"needs an engine of {STRATEGIES}", got, f"Set {name}=fsdp2.")
    from avar_verl.plugin.engine.config import AvarFSDPEngineConfig

    target = engine.get("_target_")
    own = AvarFSDPEngineConfig.__module__ + "." + AvarFSDPEngineConfig.__qualname__
    cls = get_class(target) if target else None
    if cls is None or not issubclass(cls, AvarFSDPEngineConfig):
        _refuse(wanted, "is read from AvarFSDPEngineConfig", f"{path}._target_={_text(target)}", f"Set it to {own}.")
    others = sorted(set(engine) - {field.name for field in fields(cls)} - {"_target_"})
    if others:
        got = f"{path} with the fields {others[:4]} of another engine"
        _refuse(wanted, "needs verl's FSDP engine", got, "Leave the config groups engine and model_engine as they are.")


def _check_same(path: str, given, name: str, expected, wanted: dict[str, tuple]) -> None:
    """The engine's part of the config is the node that everything else reads."""
    from verl.utils.config import omega_conf_to_dataclass

    given = None if given is None else omega_conf_to_dataclass(given)
    if wanted and given != expected:
        different = "null"
        if given is not None:
            pairs = [(field.name, getattr(given, field.name)) for field in fields(expected)]
            different = " ".join(f"{key}={_text(value)}" for key, value in pairs if value != getattr(expected, key))
        _refuse(wanted, f"is read by the engine from {path}", f"{path}: {different}", f"Set {path}=${{{name}}}.")


def _check_actor(config: DictConfig, avar: AvarConfig) -> None:
    from verl.workers.config import FSDPActorConfig

    path = "actor_rollout_ref.actor"
    actor = config.actor_rollout_ref.actor
    engine = actor.get("fsdp_config") or OmegaConf.create()
    wanted = _wanted("avar.vars", avar.vars, VARS_OFF)
    frozen = {f"{path}.fsdp_config.{name}": (True, False) for name in FREEZES if engine.get(name)}
    if actor.get("freeze_vision_tower"):
        frozen[f"{path}.freeze_vision_tower"] = (True, False)
    both = wanted | frozen
    if both and not issubclass(get_class(actor._target_), FSDPActorConfig):
        got = f"{path}._target_={actor._target_}"
        _refuse(both, "needs verl's FSDP engine", got, "Leave the config group model_engine at dp.")
    _check_engine(f"{path}.fsdp_config", engine, (f"{path}.strategy", actor.strategy), both)
    if engine.get("vars") is not None:
        _check_same(f"{path}.fsdp_config.vars", engine.vars, "avar.vars", avar.vars, wanted)


def _check_multiple(what: str, number: int, divisor: int, of: str, fix: str) -> None:
    if divisor < 1 or number % divisor:
        raise ValueError(f"{what} must be a multiple of {of}; got {number} and {divisor}. {fix}")


def _check_grpo_batches(config: DictConfig) -> None:
    """What verl's workers assert in the first step, and the rollouts before it (padding: trainer_base.py:1588).

    verl/workers/engine_workers.py:267 and :616 to :660, verl/workers/engine/utils.py:125.
    """
    ar = "actor_rollout_ref"
    actor, rollout, ref = config[ar].actor, config[ar].rollout, config[ar].get("ref")
    processes = config.trainer.n_gpus_per_node * config.trainer.nnodes
    counted = f"{config.trainer.nnodes} nodes x {config.trainer.n_gpus_per_node} processes"
    sp_size = actor.ulysses_sequence_parallel_size  # Above 1 it wins (verl/workers/config/actor.py:326).
    sp_size = sp_size if sp_size > 1 else actor.fsdp_config.ulysses_sequence_parallel_size
    _check_multiple(
        f"the number of training processes ({counted})",
        processes,
        sp_size,
        "ulysses_sequence_parallel_size",
        "Change trainer.n_gpus_per_node, trainer.nnodes or the size.",
    )
    separate = config.trainer.v1.trainer_mode == TRAINER_NAMES["separate_async"]
    if not separate or config[ar].get("hybrid_engine", True):
        _check_multiple(
            f"the number of training processes ({counted})",
            processes,
            rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size,
            f"the processes of a rollout server ({ar}.rollout.tensor_, data_ x pipeline_model_parallel_size)",
            "Change one of them.",
        )
    if actor.use_dynamic_bsz != rollout.log_prob_use_dynamic_bsz:
        raise ValueError(
            f"{ar}.actor.use_dynamic_bsz and {ar}.rollout.log_prob_use_dynamic_bsz must be the same; got "
            f"{_text(actor.use_dynamic_bsz)} and {_text(rollout.log_prob_use_dynamic_bsz)}. Set both."
        )
    ranks = processes // sp_size
    of_ranks = (
        "the number of data-parallel processes" if sp_size == 1 else f"the number of groups of {sp_size} processes"
    )
    mini = actor.ppo_mini_batch_size * rollout.n
    mini_is = f"a mini-batch ({ar}.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} x {ar}.rollout.n={rollout.n})"
    change = f"Change {ar}.actor.ppo_mini_batch_size, {ar}.rollout.n or the processes."
    _check_multiple(f"{mini_is} of rollouts", mini, ranks, of_ranks, change)
    # Rows of the batch after verl's padding; during a warm-up of the critic, the actor's mini-batches do not count.
    # separate_async takes them one by one.
    prompts = actor.ppo_mini_batch_size if separate else config.data.train_batch_size
    multiples = [math.lcm(ranks, mini)]
    if config.algorithm.adv_estimator == "gae" or config.critic.get("enable"):
        multiples = [math.lcm(ranks, config.critic.ppo_mini_batch_size * rollout.n)]
        multiples.append(math.lcm(multiples[0], mini))
    rows = {math.ceil(prompts * rollout.n / multiple) * multiple for multiple in multiples}
    of_prompts = f"{ar}.actor.ppo_mini_batch_size" if separate else "data.train_batch_size"
    rows_are = f"{of_prompts}={prompts} x {ar}.rollout.n={rollout.n}"
    parts = []
    if not actor.use_dynamic_bsz:
        parts.append((f"{mini_is} / {ranks}", {mini}, f"{ar}.actor.ppo_micro_batch_size_per_gpu", actor))
        parts.append((f"{rows_are} / {ranks}", rows, f"{ar}.rollout.log_prob_micro_batch_size_per_gpu", rollout))
    model = config[ar].model
    lora = (model.get("lora") or {}).get("rank", 0) or model.get("lora_rank", 0) or model.get("lora_adapter_path")
    with_reference = config.algorithm.get("use_kl_in_reward") or actor.use_kl_loss
    if with_reference and not lora and not ref.log_prob_use_dynamic_bsz:
        parts.append((f"{rows_are} / {ranks}", rows, f"{ar}.ref.log_prob_micro_batch_size_per_gpu", ref))
    for what, sizes, name, node in parts:
        micro = node[name.rsplit(".", 1)[1]]
        if micro is None:
            raise ValueError(f"a process needs the size of its micro-batches; got {name}=null. Set it.")
        for size in sorted(sizes):
            fix = f"Set {name} to a divisor of {size // ranks}, or {ar}.actor.use_dynamic_bsz=true."
            _check_multiple(f"the rollouts of a process ({what})", size // ranks, micro, name, fix)


def _check_rollout_log_probs(config: DictConfig) -> None:
    """Refuse settings that read the rollouts' log-probabilities where there are none.

    verl fails in the first step with `bypass_mode` (trainer_base.py:1645) and ignores the others (1768).
    """
    correction = config.algorithm.get("rollout_correction") or {}
    names = ("bypass_mode", "rollout_is", "rollout_rs")
    given = [f"algorithm.rollout_correction.{name}={_text(correction[name])}" for name in names if correction.get(name)]
    if given and not config.actor_rollout_ref.rollout.calculate_log_probs:
        raise ValueError(
            "rollout correction reads the rollouts' log-probabilities; got "
            f"actor_rollout_ref.rollout.calculate_log_probs=false with {', '.join(given)}. Set it to true."
        )


def _check_estimator(config: DictConfig) -> None:
    estimator = str(config.algorithm.adv_estimator)
    if estimator in NOT_IN_V1:
        raise ValueError(
            "verl's V1 trainer does not fetch what some estimators read; got "
            f"algorithm.adv_estimator={estimator}, which reads {NOT_IN_V1[estimator]}. Set another one, such as grpo."
        )


def _check_reward_manager(config: DictConfig, settings: RewardManagerConfig) -> None:
    manager = config.reward.reward_manager
    changed = _wanted("avar.reward", settings, {f.name: f.default for f in fields(RewardManagerConfig)})
    if changed and manager.source == "register" and manager.name != REWARD_MANAGER_NAME:
        got = f"reward.reward_manager.name={manager.name}"
        fix = f"Set reward.reward_manager.name={REWARD_MANAGER_NAME}."
        _refuse(changed, f"is read by the reward manager {REWARD_MANAGER_NAME}", got, fix)


def _check_tools(config: DictConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    tools = [name for name in ("tool_config_path", "function_tool_path") if rollout.multi_turn.get(name)]
    if rollout.agent.default_agent_loop == TOOL_AGENT_NAME and not tools:
        multi_turn = "actor_rollout_ref.rollout.multi_turn"
        raise ValueError(
            f"the agent loop {TOOL_AGENT_NAME} needs tools; got {multi_turn}.tool_config_path=null and "
            "function_tool_path=null. Set one of them (docs/multi-turn.md), or "
            "actor_rollout_ref.rollout.agent.default_agent_loop=avar_single_turn."
        )


def _check_images(config: DictConfig) -> None:
    """Refuse a folder of images that nothing writes to, and stored rollouts without the pixels that they share."""
    folder, custom = config.data.get("image_folder"), config.data.get("custom_cls")
    if folder is not None and not (custom and custom.get("path")):
        raise ValueError(
            f"images are written by AvarRLDataset; got data.image_folder={folder!r} with data.custom_cls.path=null, "
            "verl's own data set. Set data.custom_cls as avar_grpo.yaml does, or data.image_folder=null."
        )
    manager = config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class")
    skip = OmegaConf.select(config, "skip.rollout_tq.enable")
    if skip and manager == MANAGER:
        raise ValueError(
            "rollouts that are read back get new names, and those of a prompt name the one that has its pixels; got "
            f"skip.rollout_tq.enable=True with agent_loop_manager_class={manager}. Set "
            "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null."
        )


def check_grpo(config: DictConfig, avar: AvarConfig) -> None:
    """Refuse GRPO runs that would train without what `avar` asks for, or fail in the first step.

    Raises:
        ValueError: names the setting, its value and what to set instead.
    """
    defaults = {field.name: field.default for field in fields(TrainerConfig)}
    of_trainer = _wanted("avar.vars", avar.vars, VARS_OFF | {"drop_groups": "identical"})
    _check_trainer(config, of_trainer | _wanted("avar.trainer", avar.trainer, defaults))
    _check_actor(config, avar)
    mode = config.trainer.v1.trainer_mode
    if config.trainer.use_v1 and _is_avar_trainer(mode):
        check_grpo_config(config, avar.vars)
        _check_estimator(config)
        _check_rollout_log_probs(config)
        # Other engines split batches in other ways.
        if "ulysses_sequence_parallel_size" in config.actor_rollout_ref.actor:
            _check_grpo_batches(config)
    _check_reward_manager(config, avar.reward)
    _check_tools(config)
    _check_images(config)


# ---- cold start ---------------------------------------------------------------------------------------------------


def check_sft(config: DictConfig, avar: AvarConfig, processes: int) -> None:
    """Refuse cold starts that would train without what `avar` asks for, or fail in the first step.

    Args:
        processes: training processes of the run.

    Raises:
        ValueError: names the setting, its value and what to set instead.
    """
    engine = config.engine
    wanted = _wanted("avar.agto", avar.agto, AGTO_OFF)
    frozen = {f"engine.{name}": (True, False) for name in FREEZES if engine.get(name)}
    _check_engine("engine", engine, ("engine.strategy", engine.get("strategy")), wanted | frozen)
    _check_same("engine.agto", engine.get("agto"), "avar.agto", avar.agto, wanted)
    if "ulysses_sequence_parallel_size" not in engine:  # Of another engine, which splits batches in other ways.
        return
    sp_size = engine.ulysses_sequence_parallel_size
    change = "Change the number of processes or the size."
    _check_multiple("the number of processes", processes, sp_size, "engine.ulysses_sequence_parallel_size", change)
    ranks, batch = processes // sp_size, config.data.train_batch_size
    change = "Change data.train_batch_size or the number of processes."
    _check_multiple("data.train_batch_size", batch, ranks, "the number of data-parallel processes", change)
    if not config.data.use_dynamic_bsz:
        name = "data.micro_batch_size_per_gpu"
        fix = f"Set {name} to a divisor of {batch // ranks}, or data.use_dynamic_bsz=true."
        what = f"the samples of a process (data.train_batch_size={batch} / {ranks})"
        _check_multiple(what, batch // ranks, config.data.micro_batch_size_per_gpu, name, fix)


# ---- every run ----------------------------------------------------------------------------------------------------


def _check_other_stage(overrides: Sequence[str], unread: dict[str, tuple], stage: str, fix: str) -> None:
    """Refuse what the command line of this run switches on for the other stage; a config file may hold both."""
    given = {override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))}
    here = {name: pair for name, pair in unread.items() if name in given}
    if here:
        names = " ".join(f"{name}={_text(value)}" for name, (value, _) in here.items())
        raise ValueError(f"{stage} does not read some settings of its command line; got {names}. {fix}")


def _avar_node(config: DictConfig) -> AvarConfig:
    from verl.utils.config import omega_conf_to_dataclass

    if config.avar.get("_target_") is None:
        raise ValueError(
            f"the node avar must be that of avar.yaml; got {OmegaConf.to_container(config.avar)}. Start from "
            "avar_grpo.yaml or avar_sft.yaml, or add +avar=avar to the command line."
        )
    try:
        return omega_conf_to_dataclass(config.avar)
    except InstantiationException as error:
        raise ValueError(str(error.__cause__ or error)) from error


def _launcher(file: Path | None) -> str | None:
    """The launcher's path in verl's package; None outside of it."""
    import verl

    package = Path(verl.__file__).resolve().parent
    file = file and Path(file).resolve()
    return file.relative_to(package).as_posix() if file and file.is_relative_to(package) else None


def check_run(
    config: DictConfig, file: Path | None = None, overrides: Sequence[str] = (), processes: int | None = None
) -> None:
    """Refuse a run whose config has the node `avar`, before it starts.

    Args:
        config: composed config of a launcher.
        file: the file of the launcher's main function.
        overrides: its command line.
        processes: training processes of a cold start; None reads WORLD_SIZE, which torchrun sets.

    Raises:
        ValueError: names the setting, its value and what to set instead.
    """
    launcher = _launcher(file)
    if config.get("avar") is None or launcher in NOT_TRAINING:
        return
    avar = _avar_node(config)
    is_grpo = "actor_rollout_ref" in config
    if not is_grpo and "engine" not in config:
        return
    agto, vars_ = _wanted("avar.agto", avar.agto, AGTO_OFF), _wanted("avar.vars", avar.vars, VARS_OFF)
    known = "verl.trainer.main_ppo" if is_grpo else "verl.trainer.sft_trainer"
    # A launcher outside of verl is known by what its config has for verl's asynchronous runners.
    separate = sorted({"async_training", "rollout"} & set(config)) if is_grpo else []
    if separate or launcher not in (None, *(GRPO_LAUNCHERS if is_grpo else SFT_LAUNCHERS)):
        wanted = vars_ if is_grpo else agto
        got = f"the launcher verl/{launcher}" if launcher else f"a launcher with the node {separate[0]}"
        if wanted:
            _refuse(wanted, f"needs {known}", f"{got}, which trains without", f"Run python -m {known}.")
        return
    if is_grpo:
        check_grpo(config, avar)
        _check_other_stage(overrides, agto, "GRPO", "Leave them out: avar.agto guides the cold start, with avar_sft.")
        return
    if launcher == "trainer/sft_trainer_ray.py":
        processes = config.trainer.n_gpus_per_node * config.trainer.nnodes
    elif processes is None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_sft(config, avar, processes)
    for prefix, node in (("avar.reward", avar.reward), ("avar.trainer", avar.trainer)):
        vars_ |= _wanted(prefix, node, {field.name: field.default for field in fields(node)})
    _check_other_stage(overrides, vars_, "the cold start", "Leave them out: they are for GRPO, with avar_grpo.")


def check_command(command: Sequence[str]) -> None:
    """`check_run` for the command line of verl's launcher with a config of the recipe, which is not run.

    Args:
        command: with `--config-name NAME` and overrides behind it; `--nproc_per_node=N` before it.

    Raises:
        ValueError: as `check_run`.
    """
    from hydra import compose, initialize_config_module

    at = list(command).index("--config-name")
    name, overrides = command[at + 1], list(command[at + 2 :])
    processes = [word.partition("=")[2] for word in command[:at] if word.startswith("--nproc_per_node=")]
    with initialize_config_module("recipes.avar.config", version_base=None):
        config = compose(name, overrides=overrides)
    check_run(config, overrides=overrides, processes=int(processes[0]) if processes else 1)
