# SPDX-License-Identifier: Apache-2.0
"""What verl's registries hold of avar. What is patched when the plugin is on: `plugin.switch`.

`verl.plugins` (entry point, read at the end of `import verl`) imports this module in every verl process: driver, Ray
workers, agent loops, vLLM servers. What needs verl's engines or trainers waits, as a post-import hook, until verl
itself imports them. Always, with verl 0.9.1:

| registry | name | class |
| --- | --- | --- |
| verl trainer | `avar_sync` | `plugin.trainer.ppo.AvarPPOTrainer` |
| verl trainer | `avar_colocate_async` | `plugin.trainer.ppo.AvarPPOTrainerColocateAsync` |
| verl trainer | `avar_separate_async` | `plugin.trainer.ppo.AvarPPOTrainerSeparateAsync` |
| verl agent loop | `avar_single_turn` | `plugin.rollout.agent_loop.AvarSingleTurnAgentLoop` |
| verl agent loop | `avar_tool_agent` | `plugin.rollout.tool_agent_loop.AvarToolAgentLoop` |
| verl reward manager | `avar` | `plugin.rollout.reward_manager.AvarRewardManager` |
| hydra search path | `avar_sft`, `avar_grpo` | `plugin.hydra.AvarSearchPath` |

On a machine where verl runs on the CPU (`compat.cpu.detect`), which verl cannot do by itself:

| registry | name | class |
| --- | --- | --- |
| verl platform | `cpu` | `plugin.compat.cpu.platform.PlatformCPU` |
| verl engine | `language_model` x `fsdp`, `fsdp2`; `value_model` x `fsdp2` | verl's own |

When the plugin is on (`plugin.switch`), the engine of `language_model` x `fsdp`, `fsdp2` is
`plugin.engine.fsdp.AvarFSDPEngine` on every device.

verl logs an entry point that fails to load at DEBUG and goes on (verl/__init__.py:70-75), so that a run would die much
later with "Unknown trainer 'avar_sync'", or train without guidance. Here an error while registering ends the process.
"""

import importlib.metadata
import os
import sys
import traceback
from types import ModuleType

import wrapt

from avar_verl.plugin.switch import REWARD_MANAGER_NAME, TOOL_AGENT_NAME, VERL_VERSION, is_wanted, switch_on

# By their paths: hydra imports the class when a run asks for it.
AGENT_LOOPS = {
    "avar_single_turn": "avar_verl.plugin.rollout.agent_loop.AvarSingleTurnAgentLoop",
    TOOL_AGENT_NAME: "avar_verl.plugin.rollout.tool_agent_loop.AvarToolAgentLoop",
}
# Tells the processes of a run that one of them has said that it runs on the CPU.
SAID = "AVAR_VERL_SAID_CPU"


# ---- always -------------------------------------------------------------------------------------------------------


def _name_trainers(_module: ModuleType) -> None:
    from verl.trainer.ppo.v1.trainer_base import register_trainer

    from avar_verl.plugin.trainer.ppo import TRAINERS

    for name, trainer in TRAINERS.items():
        register_trainer(name)(trainer)


def _name_agent_loops(agent_loop: ModuleType) -> None:
    for name, path in AGENT_LOOPS.items():
        agent_loop._agent_loop_registry[name] = {"_target_": path}


def _name_reward_manager(_module: ModuleType) -> None:
    from verl.experimental.reward_loop.reward_manager import register

    from avar_verl.plugin.rollout.reward_manager import AvarRewardManager

    register(REWARD_MANAGER_NAME)(AvarRewardManager)


def _register_cpu_engines(_module: ModuleType) -> None:
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

    from avar_verl.plugin.compat.cpu.detect import PLATFORM

    EngineRegistry.register("language_model", ["fsdp", "fsdp2"], PLATFORM)(FSDPEngineWithLMHead)
    EngineRegistry.register("value_model", ["fsdp2"], PLATFORM)(FSDPEngineWithValueHead)


def _run_on_cpu() -> None:
    from avar_verl.plugin.compat.cpu import flash, process_group, saved_policy, vllm

    if SAID not in os.environ:
        os.environ[SAID] = "1"
        print("avar_verl: no accelerator, so verl runs on the CPU (VERL_PLATFORM=cpu)", file=sys.stderr)
    process_group.apply()
    vllm.alias_distribution()
    wrapt.register_post_import_hook(flash.apply, "verl.models.transformers.qwen2_vl")
    wrapt.register_post_import_hook(saved_policy.apply, "verl.utils.fsdp_utils")
    wrapt.register_post_import_hook(_register_cpu_engines, "verl.workers.engine")


# ---- the entry point ----------------------------------------------------------------------------------------------


def register() -> None:
    """Make avar's names known to verl, and switch the plugin on if the environment says so."""
    if importlib.metadata.version("verl") == VERL_VERSION:
        import avar_verl.plugin.compat.cpu.platform  # noqa: F401  registers the platform
        from avar_verl.plugin.compat.cpu import detect

        if detect.is_active():
            _run_on_cpu()
        wrapt.register_post_import_hook("avar_verl.plugin.hydra:register", "hydra")
        wrapt.register_post_import_hook(_name_trainers, "verl.trainer.ppo.v1")
        wrapt.register_post_import_hook(_name_agent_loops, "verl.experimental.agent_loop.agent_loop")
        wrapt.register_post_import_hook(_name_reward_manager, "verl.experimental.reward_loop.reward_manager")
    if is_wanted():
        switch_on()


try:
    register()
except Exception:
    # Broad on purpose: whatever it was, verl would swallow it. SystemExit is the one thing that it lets through.
    traceback.print_exc()
    sys.exit("avar_verl could not register itself with verl (see the error above).")
