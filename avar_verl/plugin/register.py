# SPDX-License-Identifier: Apache-2.0
"""The one place that touches verl's registries.

`verl.plugins` (entry point, read at the end of `import verl`) imports this module in every verl process: driver, Ray
workers, agent loops, vLLM servers. Importing it costs nothing heavy: what needs verl's engines or trainers waits, as a
post-import hook, until verl itself imports them. Names registered:

| registry | name | class |
| --- | --- | --- |
| verl platform | `cpu` | `plugin.compat.cpu.platform.PlatformCPU` |
| verl engine | `language_model` x `fsdp`, `fsdp2`, for cuda, npu and the CPU | `plugin.engine.fsdp.AvarFSDPEngine` |
| verl trainer | `avar_sync` | `plugin.trainer.ppo.AvarPPOTrainer` |
| verl agent loop | `avar_single_turn` | `plugin.rollout.agent_loop.AvarSingleTurnAgentLoop` |
| verl reward manager | `avar` | `plugin.rollout.reward_manager.AvarRewardManager` |

verl logs an entry point that fails to load at DEBUG and goes on (verl/__init__.py:70-75), so that a run would die much
later with "Unknown trainer 'avar_sync'", or train without guidance. Here an error while registering ends the process.
"""

import importlib.metadata
import sys
import traceback

import wrapt

VERL_VERSION = "0.9.1"
TRAINER_NAME = "avar_sync"
AGENT_LOOP_NAME = "avar_single_turn"
REWARD_MANAGER_NAME = "avar"
# (device, vendor) keys that win over the device keys of verl's own FSDP engines.
ACCELERATORS = {"cuda": ["nvidia", "amd"], "npu": ["huawei"]}


def _register_engines(_module) -> None:
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead

    from avar_verl.plugin.compat.cpu.detect import PLATFORM
    from avar_verl.plugin.engine.fsdp import AvarFSDPEngine

    for device, vendors in ACCELERATORS.items():
        EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device, vendors)(AvarFSDPEngine)
    EngineRegistry.register("language_model", ["fsdp", "fsdp2"], PLATFORM)(AvarFSDPEngine)
    EngineRegistry.register("value_model", ["fsdp2"], PLATFORM)(FSDPEngineWithValueHead)


def _register_trainer(_module) -> None:
    from verl.trainer.ppo.v1.trainer_base import register_trainer

    from avar_verl.plugin.trainer.ppo import AvarPPOTrainer

    register_trainer(TRAINER_NAME)(AvarPPOTrainer)


def _wrap_packed_attention(qwen2_vl) -> None:
    from avar_verl.plugin.compat.verl import packed_attention  # Imports transformers, as that module has.

    packed_attention.apply(qwen2_vl)


def _register_agent_loop(_module) -> None:
    from verl.experimental.agent_loop.agent_loop import register

    from avar_verl.plugin.rollout.agent_loop import AvarSingleTurnAgentLoop

    register(AGENT_LOOP_NAME)(AvarSingleTurnAgentLoop)


def _register_reward_manager(_module) -> None:
    from verl.experimental.reward_loop.reward_manager import register

    from avar_verl.plugin.rollout.reward_manager import AvarRewardManager

    register(REWARD_MANAGER_NAME)(AvarRewardManager)


def _register() -> None:
    installed = importlib.metadata.version("verl")
    if installed != VERL_VERSION:
        raise ValueError(
            f"avar_verl plugs into verl {VERL_VERSION}; got verl {installed}. Install verl=={VERL_VERSION}, or keep "
            "avar_verl from loading with VERL_USE_EXTERNAL_PLUGINS=none."
        )
    import avar_verl.plugin.compat.cpu.platform  # noqa: F401  registers the platform
    from avar_verl.plugin.compat.cpu import detect, process_group
    from avar_verl.plugin.compat.cpu import flash as cpu_flash
    from avar_verl.plugin.compat.cpu import vllm as vllm_cpu
    from avar_verl.plugin.compat.verl import (
        fsdp2_targets,
        glm4v,
        metrics,
        position_ids,
        processor,
        rollout_features,
        text_only,
    )

    wrapt.register_post_import_hook("avar_verl.plugin.search_path:register", "hydra")
    if detect.is_active():
        process_group.apply()
        vllm_cpu.alias_distribution()
        wrapt.register_post_import_hook(cpu_flash.apply, "verl.models.transformers.qwen2_vl")
    wrapt.register_post_import_hook(position_ids.apply, "verl.utils.tensordict_utils")
    wrapt.register_post_import_hook(text_only.apply, "verl.models.transformers.qwen2_vl")
    wrapt.register_post_import_hook(glm4v.apply, "verl.models.transformers.glm4v")
    wrapt.register_post_import_hook(glm4v.apply_flops, "verl.utils.flops_counter")
    wrapt.register_post_import_hook(fsdp2_targets.apply, "verl.utils.fsdp_utils")
    wrapt.register_post_import_hook(processor.apply, "verl.utils.tokenizer.tokenizer")
    wrapt.register_post_import_hook(rollout_features.apply, "verl.experimental.agent_loop.agent_loop")
    wrapt.register_post_import_hook(_wrap_packed_attention, "verl.models.transformers.qwen2_vl")
    wrapt.register_post_import_hook(metrics.apply, "verl.workers.engine_workers")
    wrapt.register_post_import_hook(_register_engines, "verl.workers.engine")
    wrapt.register_post_import_hook(_register_trainer, "verl.trainer.ppo.v1")
    wrapt.register_post_import_hook(_register_agent_loop, "verl.experimental.agent_loop")
    wrapt.register_post_import_hook(_register_reward_manager, "verl.experimental.reward_loop.reward_manager")


try:
    _register()
except Exception:
    # Broad on purpose: whatever it was, verl would swallow it. SystemExit is the one thing that it lets through.
    traceback.print_exc()
    sys.exit("avar_verl could not register itself with verl (see the error above).")
