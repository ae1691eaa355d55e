# SPDX-License-Identifier: Apache-2.0
"""The plugin is off until a run names avar.

    off    verl's registries know avar's names, and nothing of verl is changed: engine classes are verl's own
    on     `AvarFSDPEngine` takes the place of verl's FSDP engines, and the patches of `compat.verl` are applied

Each process of a run is switched on by whatever comes first:

- `AVAR_VERL=1` in its environment, read when verl is imported. avar_grpo.yaml gives it to every Ray worker
  (`runtime_env`);
- the hydra callback `plugin.hydra.SwitchOn`, which comes with the node `avar`, in the process that reads the config;
- the first use of an avar class: its engine config, trainer, reward manager, agent loop or data set.

So a config that was not made from the recipe's needs the node `avar` (`+avar=avar`) and avar_grpo.yaml's `runtime_env`;
the trainers refuse to start without the second.
"""

import importlib.metadata
import os

import wrapt

VARIABLE = "AVAR_VERL"
VERL_VERSION = "0.9.1"
# In verl's registries (`register`), whether the plugin is on or off.
# Our trainer for each of verl's (`trainer.v1.trainer_mode`).
TRAINER_NAMES = {
    "sync": "avar_sync",
    "colocate_async": "avar_colocate_async",
    "separate_async": "avar_separate_async",
}
REWARD_MANAGER_NAME = "avar"
TOOL_AGENT_NAME = "avar_tool_agent"
# What is done when a module of verl is imported. By name, since these modules import this one.
PATCHES = (
    ("compat.verl.position_ids:apply", "verl.utils.tensordict_utils"),
    ("compat.verl.text_only:apply", "verl.models.transformers.qwen2_vl"),
    ("compat.verl.glm4v:apply", "verl.models.transformers.glm4v"),
    ("compat.verl.qwen3_5:apply", "verl.models.transformers.qwen3_5"),
    ("compat.verl.glm4v:apply_flops", "verl.utils.flops_counter"),
    ("compat.verl.fsdp2_targets:apply", "verl.utils.fsdp_utils"),
    ("compat.verl.processor:apply", "verl.utils.tokenizer.tokenizer"),
    ("compat.verl.loading:apply", "verl.utils.model"),
    ("compat.verl.rollout_features:apply", "verl.experimental.agent_loop.agent_loop"),
    ("compat.verl.shared_features:apply", "verl.utils.transferqueue_utils"),
    ("compat.verl.packed_attention:apply", "verl.models.transformers.qwen2_vl"),
    ("compat.verl.metrics:apply", "verl.workers.engine_workers"),
    ("compat.verl.weight_socket:apply_sender", "verl.workers.rollout.vllm_rollout.vllm_rollout"),
    ("compat.verl.weight_socket:apply_receiver", "verl.workers.rollout.vllm_rollout.utils"),
    ("engine.fsdp:register_engine", "verl.workers.engine"),
)
_is_on = False


def is_wanted() -> bool:
    """Whether the environment switches the plugin on.

    Raises:
        ValueError: a value other than 0 and 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1; got {value!r}. 1 switches avar_verl on in this process.")
    return value == "1"


def check_verl() -> None:
    """Refuse another verl than the one this plugin is written for.

    Raises:
        ValueError: naming both versions.
    """
    installed = importlib.metadata.version("verl")
    if installed != VERL_VERSION:
        raise ValueError(
            f"avar_verl plugs into verl {VERL_VERSION}; got verl {installed}. Install verl=={VERL_VERSION}, or run a "
            "config that does not name avar."
        )


def switch_on() -> None:
    """Switch the plugin on in this process and in those that it starts. The first call counts.

    Modules of verl that are imported already are patched now, the others as soon as they are imported.

    Raises:
        ValueError: another version of verl.
    """
    global _is_on
    if _is_on:
        return
    check_verl()
    from avar_verl.model.families import load_outside

    load_outside()  # They may register the model, which verl loads.
    _is_on = True  # Before the patches: what they import switches on too.
    os.environ[VARIABLE] = "1"
    for hook, module in PATCHES:
        wrapt.register_post_import_hook(f"avar_verl.plugin.{hook}", module)
