# SPDX-License-Identifier: Apache-2.0
"""Runs that would train without what `avar` asks for, or fail in the first step, end before verl starts anything."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import verl
import yaml
from omegaconf import OmegaConf

from avar_verl.plugin.refusals import check_command, check_grpo, check_run
from tests.plugin.test_config import CONFIG_DIR, recipe

VERL = Path(verl.__file__).parent
REPOSITORY = Path(__file__).parents[2]
MAIN_PPO, SFT = VERL / "trainer" / "main_ppo.py", VERL / "trainer" / "sft_trainer.py"
ASYNC = "experimental/fully_async_policy/fully_async_main.py"
ONE_STEP = "experimental/one_step_off_policy/main_ppo.py"
OFF = "avar.vars.lambda_v=0"


@functools.cache
def composed(name: str, *groups: str):
    return recipe(name, *groups)


def configured(name: str, *overrides: str):
    """The recipe with these overrides; composed again only for config groups."""
    groups = [one for one in overrides if one.split("=")[0] in ("machine", "engine", "model_engine")]
    config = copy.deepcopy(composed(name, *groups))
    for key, value in (one.split("=", 1) for one in overrides if one not in groups):
        OmegaConf.update(config, key.lstrip("+"), yaml.safe_load(value), force_add=key.startswith("+"))
    return config


def grpo(*overrides: str, launcher: Path = MAIN_PPO) -> None:
    check_run(configured("avar_grpo", "machine=cpu_grpo", *overrides), launcher, overrides)


def sft(*overrides: str, launcher: Path = SFT, processes: int = 1) -> None:
    check_run(configured("avar_sft", "machine=cpu_sft", *overrides), launcher, overrides, processes)


# ---- GRPO ---------------------------------------------------------------------------------------------------------

ACTOR = "actor_rollout_ref.actor"
STOCK_ENGINE = f"{ACTOR}.fsdp_config._target_=verl.workers.config.FSDPEngineConfig"
WITHOUT = [
    ("trainer.v1.trainer_mode=sync", "Set trainer.v1.trainer_mode=avar_sync"),
    ("trainer.v1.trainer_mode=colocate_async", "Set trainer.v1.trainer_mode=avar_colocate_async"),
    ("trainer.v1.trainer_mode=separate_async", "Set trainer.v1.trainer_mode=avar_separate_async"),
    ("trainer.v1.trainer_mode=nobodys", "Set trainer.v1.trainer_mode=avar_sync"),
    ("trainer.use_v1=false", "Set trainer.use_v1=true"),
    (f"{ACTOR}.strategy=fsdp_turbo", f"Set {ACTOR}.strategy=fsdp2"),
    (f"{ACTOR}.strategy=megatron", f"Set {ACTOR}.strategy=fsdp2"),
    ("model_engine=megatron", "Leave the config group model_engine at dp"),
    ("model_engine=veomni", "Leave the config group model_engine at dp"),
    ("model_engine=torchtitan", "Leave the config group model_engine at dp"),
    (STOCK_ENGINE, "Set it to avar_verl.plugin.engine.config.AvarFSDPEngineConfig"),
]


@pytest.mark.parametrize("setting, way_out", WITHOUT)
def test_grpo_that_would_train_without_is_refused(setting, way_out):
    name, value = setting.split("=")
    with pytest.raises(ValueError) as refused:
        grpo(setting)
    message = str(refused.value)
    got = f"{ACTOR}._target_=" if name == "model_engine" else f"{name}={value}"
    assert message.startswith("avar.vars.lambda_v=0.3 ") and got in message
    assert way_out in message and message.endswith(f"To run without: {OFF}.")


@pytest.mark.parametrize("setting, way_out", WITHOUT[:7])
def test_it_is_verls_own_run_where_nothing_is_asked(setting, way_out):
    grpo(setting, OFF)


@pytest.mark.parametrize(
    "asked, shown",
    [
        ("measure=true", "avar.vars.measure=true needs"),
        ("measure_dependency=true", "avar.vars.measure_dependency=true needs"),
        ("token_weights=dependency", "avar.vars.token_weights=dependency needs"),
        ("drop_groups=all_wrong", "avar.vars.drop_groups=all_wrong needs"),
    ],
)
def test_every_switch_asks_for_our_trainer(asked, shown):
    with pytest.raises(ValueError, match=shown):
        grpo("trainer.v1.trainer_mode=sync", OFF, f"avar.vars.{asked}")


def test_a_setting_of_the_trainer_or_the_reward_manager_needs_it():
    with pytest.raises(ValueError, match="avar.trainer.poll_interval_s=1.0 needs an avar trainer or a subclass of one"):
        grpo("trainer.v1.trainer_mode=sync", OFF, "avar.trainer.poll_interval_s=1.0")
    with pytest.raises(ValueError, match="avar.reward.max_failures=3 is read by the reward manager avar; got .*naive"):
        grpo("reward.reward_manager.name=naive", "avar.reward.max_failures=3")
    grpo("reward.reward_manager.name=naive")


def test_all_settings_that_are_on_are_named():
    with pytest.raises(ValueError) as refused:
        grpo("trainer.v1.trainer_mode=sync", "avar.vars.measure=true")
    assert str(refused.value).startswith("avar.vars.lambda_v=0.3, avar.vars.measure=true needs")
    assert str(refused.value).endswith("To run without: avar.vars.lambda_v=0 avar.vars.measure=false.")


def test_the_tool_agent_needs_tools():
    agent = "actor_rollout_ref.rollout.agent.default_agent_loop=avar_tool_agent"
    with pytest.raises(ValueError, match="the agent loop avar_tool_agent needs tools; got .*tool_config_path=null"):
        grpo(agent)
    for name in ("tool_config_path", "function_tool_path"):
        grpo(agent, f"actor_rollout_ref.rollout.multi_turn.{name}=tools")


@pytest.mark.parametrize("file", [ASYNC, ONE_STEP])
def test_other_launchers_of_verl_are_refused(file):
    with pytest.raises(
        ValueError, match=f"avar.vars.lambda_v=0.3 needs verl.trainer.main_ppo; got the launcher verl/{file}"
    ):
        grpo(launcher=VERL / file)
    grpo(OFF, launcher=VERL / file)


def test_a_copy_of_them_is_known_by_its_config(tmp_path):
    for node in ("+async_training.require_batches=1", "+rollout.nnodes=1"):
        with pytest.raises(ValueError, match="got a launcher with the node (async_training|rollout)"):
            grpo(node, launcher=tmp_path / "mine.py")
    grpo(launcher=tmp_path / "mine.py")


def test_generation_does_not_train():
    grpo("trainer.v1.trainer_mode=sync", launcher=VERL / "trainer" / "main_generation_server.py")


def test_the_recipes_themselves_pass():
    grpo()
    sft()
    for machine in ("gpu_grpo", "cpu_grpo"):
        check_run(recipe("avar_grpo", f"machine={machine}"), MAIN_PPO)
    eight = ["trainer.n_gpus_per_node=8", "trainer.nnodes=2"]
    check_run(recipe("avar_grpo", *eight), MAIN_PPO, eight)
    check_run(recipe("avar_sft"), SFT, processes=8)


def test_a_trainer_of_somebodys_own():
    """A subclass of ours passes, another class does not."""
    from verl.trainer.ppo.v1 import PPOTrainerSync
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from avar_verl.plugin.trainer.ppo import AvarPPOTrainerColocateAsync

    own = {
        "own_avar": type("Own", (AvarPPOTrainerColocateAsync,), {}),
        "own_sync": type("Other", (PPOTrainerSync,), {}),
    }
    TRAINER_REGISTRY.update(own)
    try:
        grpo("trainer.v1.trainer_mode=own_avar")
        with pytest.raises(ValueError, match="got trainer.v1.trainer_mode=own_sync"):
            grpo("trainer.v1.trainer_mode=own_sync")
    finally:
        for name in own:
            del TRAINER_REGISTRY[name]


def test_the_engine_measures_what_the_trainer_reads():
    config = configured("avar_grpo", "machine=cpu_grpo")
    engine = config.actor_rollout_ref.actor.fsdp_config
    engine.vars = OmegaConf.create({**config.avar.vars, "lambda_v": 0, "epsilon": 1e-3})
    with pytest.raises(ValueError, match=r"fsdp_config.vars: lambda_v=0 epsilon=0.001. Set .*=\$\{avar.vars\}"):
        check_run(config, MAIN_PPO)


@pytest.mark.parametrize("name", ["freeze_vision_tower", "fsdp_config.freeze_projector"])
def test_another_engine_would_not_freeze(name):
    with pytest.raises(ValueError, match=f"{ACTOR}.*=true needs an engine of .* got {ACTOR}.strategy=fsdp_turbo"):
        grpo(f"{ACTOR}.{name}=true", f"{ACTOR}.strategy=fsdp_turbo", OFF, "trainer.v1.trainer_mode=sync")


def test_the_node_alone_is_checked():
    """A stock config with `avar` and nothing else of the recipe; the node must be the recipe's."""
    overrides = ["+avar=avar", "actor_rollout_ref.rollout.name=vllm"]
    with pytest.raises(ValueError, match="avar.vars.lambda_v=0.3 needs an avar trainer or a subclass of one"):
        check_run(recipe("ppo_trainer", *overrides), MAIN_PPO, overrides)
    with pytest.raises(ValueError, match="avar.agto.alpha=0.15, avar.agto.beta=0.15 is read from AvarFSDPEngineConfig"):
        check_run(recipe("sft_trainer_engine", "+avar=avar", "engine.strategy=fsdp2"), SFT)
    with pytest.raises(ValueError, match=r"the node avar must be that of avar.yaml; got \{'vars'"):
        check_run(configured("ppo_trainer", "+avar.vars.lambda_v=0.3"), MAIN_PPO)
    check_run(configured("ppo_trainer"), MAIN_PPO)
    check_run(configured("sft_trainer_engine"), SFT)


def test_values_are_checked_before_anything_starts():
    with pytest.raises(ValueError, match="^lambda_v must be >= 0; got -1"):
        grpo("avar.vars.lambda_v=-1")
    with pytest.raises(ValueError, match="^alpha must be >= 0; got -1"):
        sft("avar.agto.alpha=-1")


# ---- batches ------------------------------------------------------------------------------------------------------

SMALL = ["data.train_batch_size=4", "actor_rollout_ref.rollout.n=4", f"{ACTOR}.ppo_mini_batch_size=4"]
SP = f"{ACTOR}.ulysses_sequence_parallel_size"
MICRO, LOG_PROB = f"{ACTOR}.ppo_micro_batch_size_per_gpu", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"
REF = "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"


@pytest.mark.parametrize(
    "overrides, message",
    [
        # 4 prompts x 4 rollouts = 16 of one process.
        ([f"{MICRO}=3"], rf"=4\) / 1\) must be a multiple of {MICRO}; got 16 and 3. Set {MICRO} to a divisor of 16"),
        ([f"{MICRO}=8", f"{LOG_PROB}=5"], f"must be a multiple of {LOG_PROB}; got 16 and 5"),
        ([f"{MICRO}=8", f"{LOG_PROB}=32"], f"must be a multiple of {LOG_PROB}; got 16 and 32"),
        # 16 on 3 processes.
        (["trainer.n_gpus_per_node=3"], "must be a multiple of the number of data-parallel processes; got 16 and 3"),
        # 2 nodes x 2 processes in groups of 2: 8 rollouts of a group.
        (
            ["trainer.n_gpus_per_node=2", "trainer.nnodes=2", f"{SP}=2", f"{MICRO}=16"],
            f"must be a multiple of {MICRO}; got 8 and 16",
        ),
        (["trainer.n_gpus_per_node=3", f"{SP}=2"], "ulysses_sequence_parallel_size; got 3 and 2"),
        # A batch of 6 prompts is padded to two mini-batches of 4: 32 rollouts, not 24.
        (["data.train_batch_size=6", f"{MICRO}=8", f"{LOG_PROB}=12"], f"of {LOG_PROB}; got 32 and 12"),
        ([f"{ACTOR}.use_kl_loss=true", f"{REF}=6"], f"must be a multiple of {REF}; got 16 and 6"),
        (["actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true"], "must be the same; got false and true"),
        (["actor_rollout_ref.rollout.tensor_model_parallel_size=2"], "of a rollout server .*; got 1 and 2"),
        ([f"{MICRO}=null"], f"got {MICRO}=null. Set it"),
    ],
)  # fmt: skip
def test_grpo_batches_that_verl_refuses_in_the_first_step(overrides, message):
    with pytest.raises(ValueError, match=message):
        grpo(*SMALL, *overrides)
    # Whatever is rewarded.
    with pytest.raises(ValueError, match=message):
        grpo(*SMALL, *overrides, OFF)


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{MICRO}=16", f"{LOG_PROB}=16"],
        ["data.train_batch_size=6", f"{MICRO}=8", f"{LOG_PROB}=32"],
        [f"{MICRO}=3", f"{LOG_PROB}=5", f"{ACTOR}.use_dynamic_bsz=true"],
        ["trainer.n_gpus_per_node=2", f"{MICRO}=8", f"{LOG_PROB}=8"],
        [f"{REF}=6"],  # No reference policy reads it.
        [f"{ACTOR}.use_kl_loss=true", f"{REF}=6", "actor_rollout_ref.model.lora_rank=8"],  # The actor's engine does.
    ],
)
def test_grpo_batches_that_fit(overrides):
    grpo(*SMALL, *overrides)


SEPARATE = [
    "trainer.v1.trainer_mode=avar_separate_async",
    "data.train_batch_size=8",
    "actor_rollout_ref.rollout.n=4",
    f"{ACTOR}.ppo_mini_batch_size=2",
    f"{MICRO}=8",
]


def test_separate_async_takes_mini_batches_one_by_one():
    """8 prompts in steps of 2: 8 rollouts a pass, where the synchronous trainer has 32."""
    grpo(*SEPARATE, f"{LOG_PROB}=8")
    with pytest.raises(ValueError, match=rf"ppo_mini_batch_size=2 x .*n=4 / 1\) must be .* {LOG_PROB}; got 8 and 16"):
        grpo(*SEPARATE, f"{LOG_PROB}=16")
    grpo(*SEPARATE, f"{LOG_PROB}=16", "trainer.v1.trainer_mode=avar_sync")


def test_separate_async_may_have_servers_of_another_size():
    """One training process, servers of two, unless they share the training processes."""
    two = [*SEPARATE, f"{LOG_PROB}=8", "actor_rollout_ref.rollout.tensor_model_parallel_size=2"]
    with pytest.raises(ValueError, match="of a rollout server .*; got 1 and 2"):
        grpo(*two)
    grpo(*two, "actor_rollout_ref.hybrid_engine=false")


@pytest.mark.parametrize("setting", ["bypass_mode=true", "rollout_is=token", "rollout_rs=seq_mean_k1"])
def test_rollout_correction_needs_the_rollouts_log_probs(setting):
    correction = f"algorithm.rollout_correction.{setting}"
    no_log_probs = "actor_rollout_ref.rollout.calculate_log_probs=false"
    with pytest.raises(ValueError, match=f"calculate_log_probs=false with {correction}. Set it to true"):
        grpo(correction, no_log_probs)
    grpo(correction)
    grpo(no_log_probs)


@pytest.mark.parametrize("micro, fits", [(1, True), (4, True), (8, True), (3, False), (5, False), (16, False)])
def test_the_rule_of_micro_batches_is_verls(micro, fits):
    """verl's own assertion, on the rows that the check computes."""
    import torch
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.utils import prepare_micro_batches

    data = TensorDict({"x": torch.zeros(8)}, batch_size=8)
    tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=micro)
    two = ["trainer.n_gpus_per_node=2", *SMALL, f"{MICRO}=8", f"{LOG_PROB}={micro}"]
    if fits:
        assert len(prepare_micro_batches(data)[0]) == 8 // micro
        grpo(*two)
        return
    with pytest.raises(AssertionError, match=r"data size must be divisible by force_group_size \* micro_batch_size"):
        prepare_micro_batches(data)
    with pytest.raises(ValueError, match=f"got 8 and {micro}"):
        grpo(*two)


def test_a_folder_of_images_needs_the_data_set_that_writes_it():
    folder = "data.image_folder=/shared/images"
    with pytest.raises(ValueError, match="images are written by AvarRLDataset; got data.image_folder='/shared/images'"):
        grpo(folder, "data.custom_cls.path=null")
    grpo(folder)
    grpo("data.custom_cls.path=null")


def test_rollouts_that_are_read_back_do_not_share_pixels():
    skip, manager = "skip.rollout_tq.enable=true", "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null"
    with pytest.raises(ValueError, match="rollouts that are read back get new names.*agent_loop_manager_class=null"):
        grpo(skip)
    grpo(skip, manager)


@pytest.mark.parametrize(
    "overrides, processes, message",
    [
        (["data.train_batch_size=8", "data.micro_batch_size_per_gpu=3"], 1, "micro_batch_size_per_gpu; got 8 and 3"),
        (["data.train_batch_size=8", "data.micro_batch_size_per_gpu=8"], 2, "micro_batch_size_per_gpu; got 4 and 8"),
        (["data.train_batch_size=8"], 3, "the number of data-parallel processes; got 8 and 3"),
        (["engine.ulysses_sequence_parallel_size=2"], 3, "ulysses_sequence_parallel_size; got 3 and 2"),
    ],
)  # fmt: skip
def test_cold_start_batches(overrides, processes, message):
    with pytest.raises(ValueError, match=message):
        sft(*overrides, processes=processes)
    sft("data.train_batch_size=8", "data.micro_batch_size_per_gpu=3", "data.use_dynamic_bsz=true", processes=2)


# ---- cold start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, got, way_out",
    [
        ("engine.strategy=fsdp_turbo", "engine.strategy=fsdp_turbo", "Set engine.strategy=fsdp2"),
        ("engine.strategy=megatron", "engine.strategy=megatron", "Set engine.strategy=fsdp2"),
        ("engine=veomni", "engine with the fields", "Leave the config groups"),
        ("engine=torchtitan", "engine with the fields", "Leave the config groups"),
        ("engine=megatron", "engine with the fields", "Leave the config groups"),
        ("engine._target_=verl.workers.config.FSDPEngineConfig", "engine._target_=verl", "Set it to avar_verl"),
        ("engine.agto=null", "engine.agto: null", r"Set engine.agto=${avar.agto}"),
    ],
)
def test_cold_starts_that_would_train_without_are_refused(setting, got, way_out):
    with pytest.raises(ValueError) as refused:
        sft(setting)
    message = str(refused.value)
    assert message.startswith("avar.agto.alpha=0.15, avar.agto.beta=0.15 ") and got in message and way_out in message
    assert message.endswith("To run without: avar.agto.alpha=0 avar.agto.beta=0.")
    sft(setting, "avar.agto.alpha=0", "avar.agto.beta=0")


def test_the_engine_config_refuses_what_another_engine_would_ignore():
    from avar_verl.plugin.config import AgtoConfig
    from avar_verl.plugin.engine.config import AvarFSDPEngineConfig

    for asked in ({"agto": AgtoConfig()}, {"freeze_projector": True}):
        with pytest.raises(ValueError, match=rf"\['{next(iter(asked))}'\] .* got strategy='fsdp_turbo'"):
            AvarFSDPEngineConfig(strategy="fsdp_turbo", **asked)
        AvarFSDPEngineConfig(strategy="fsdp2", **asked)
    AvarFSDPEngineConfig(strategy="fsdp_turbo")


# ---- settings of the other stage ----------------------------------------------------------------------------------


def test_what_the_other_stage_reads_is_refused_on_the_command_line_only(tmp_path):
    with pytest.raises(ValueError, match="the cold start does not read .* got avar.vars.lambda_v=0.5"):
        sft("avar.vars.lambda_v=0.5")
    with pytest.raises(ValueError, match="got avar.trainer.poll_interval_s=1"):
        sft("avar.trainer.poll_interval_s=1")
    with pytest.raises(ValueError, match="GRPO does not read .* got avar.agto.alpha=0.2"):
        grpo("avar.agto.alpha=0.2")
    # Nothing is switched on, or both stages share it.
    sft(OFF, "avar.vars.layers=[0]")
    grpo("avar.agto.alpha=0", "avar.agto.layers=[0]")
    check_run(configured("avar_sft", "avar.vars.lambda_v=0.5"), SFT, processes=1)  # from a file


# ---- commands, the trainer, the launchers -------------------------------------------------------------------------


def test_a_command_is_checked_without_running_it():
    head = ["python", "-m", "verl.trainer.main_ppo", "--config-name", "avar_grpo", "machine=cpu_grpo"]
    check_command([*head, *SMALL, f"{MICRO}=8", f"{LOG_PROB}=8"])
    with pytest.raises(ValueError, match="got 16 and 64"):
        check_command([*head, *SMALL, f"{MICRO}=64"])
    torchrun = ["torchrun", "--nproc_per_node=2", "-m", "verl.trainer.sft_trainer", "--config-name", "avar_sft"]
    with pytest.raises(ValueError, match="the number of data-parallel processes; got 7 and 2"):
        check_command([*torchrun, "machine=cpu_sft", "data.train_batch_size=7"])


def test_the_demo_refuses_its_settings_before_it_trains(tmp_path):
    from avar_verl.tools.demo.run import run_demo

    with pytest.raises(ValueError, match=f"must be a multiple of {MICRO}; got 40 and 64"):
        run_demo(tmp_path, grpo_prompts=5)
    with pytest.raises(ValueError, match="^lambda_v must be >= 0; got -1"):
        run_demo(tmp_path / "negative", vars={"lambda_v": -1})
    assert not any(tmp_path.glob("**/*.parquet"))


def test_the_trainer_asks_the_same(monkeypatch):
    from avar_verl.plugin.config import AvarConfig
    from avar_verl.plugin.trainer.ppo import AvarPPOTrainer

    monkeypatch.setenv("AVAR_VERL", "1")
    config = configured("avar_grpo", "machine=cpu_grpo", *SMALL, f"{MICRO}=3")
    for refuse in (lambda: check_grpo(config, AvarConfig()), lambda: AvarPPOTrainer(config)):
        with pytest.raises(ValueError, match=f"must be a multiple of {MICRO}; got 16 and 3"):
            refuse()


CONFIG = ["--config-dir", str(CONFIG_DIR), "--config-name"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "verl.trainer.sft_trainer"]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "command, message",
    [
        (
            ["-m", "verl.trainer.main_ppo", *CONFIG, "avar_grpo", "machine=cpu_grpo", "trainer.v1.trainer_mode=sync"],
            "avar.vars.lambda_v=0.3 needs an avar trainer or a subclass of one; got trainer.v1.trainer_mode=sync",
        ),
        (
            ["-m", "verl.trainer.main_ppo", "+avar=avar"],
            "avar.vars.lambda_v=0.3 needs an avar trainer or a subclass of one; got trainer.v1.trainer_mode=",
        ),
        (
            [*TORCHRUN, *CONFIG, "avar_sft", "machine=cpu_sft", "engine.strategy=fsdp_turbo"],
            "avar.agto.alpha=0.15, avar.agto.beta=0.15 needs an engine of ('fsdp', 'fsdp2'); got engine.strategy=fsdp_",
        ),
        (
            ["-m", "verl.experimental.fully_async_policy.fully_async_main", "+avar=avar"],
            f"avar.vars.lambda_v=0.3 needs verl.trainer.main_ppo; got the launcher verl/{ASYNC}",
        ),
        (
            ["-m", "verl.experimental.one_step_off_policy.main_ppo", *CONFIG, "avar_grpo", "machine=cpu_grpo"],
            f"avar.vars.lambda_v=0.3 needs verl.trainer.main_ppo; got the launcher verl/{ONE_STEP}",
        ),
    ],
    ids=["main_ppo", "main_ppo_stock_config", "sft_trainer", "fully_async", "one_step_off"],
)  # fmt: skip
def test_launchers_end_before_ray_starts(command, message, tmp_path):
    done = subprocess.run(
        [sys.executable, *command, f"hydra.run.dir={tmp_path}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stderr[-4000:]
    assert f"avar_verl refuses this run: {message}" in done.stderr
    assert "Started a local Ray instance" not in done.stderr
