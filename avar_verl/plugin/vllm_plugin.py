# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.general_plugins`: called in every vLLM process before it builds a model. Does not import verl."""

import os
import sys

import wrapt

from avar_verl.plugin import switch
from avar_verl.plugin.compat.cpu import detect
from avar_verl.plugin.compat.cpu import vllm as vllm_cpu
from avar_verl.plugin.compat.vllm import minicpmv4_6

HOOK = "avar_verl.intervention.vllm_hook"
# Tells the processes of an engine what the one that started them has decided.
STOCK = "AVAR_VERL_STOCK_VLLM"


def in_stock_verl() -> bool:
    """Whether this process is part of a verl run that does not name avar: its vLLM is not touched.

    An engine outside verl may be asked for the intervention, and has to say so if it was not started for it.
    """
    if switch.is_wanted():
        return False
    if STOCK not in os.environ:
        os.environ[STOCK] = str(int("verl" in sys.modules and HOOK not in sys.modules))
    return os.environ[STOCK] == "1"


def register() -> None:
    """On the CPU, make `vllm-cpu` count as `vllm`, keep weights updatable and zero blocks of the cache that are used
    again. Except in a stock verl run, let requests use the intervention (`intervention.vllm_hook`), and write prompts
    as training does (`compat.vllm`): patches are applied when vLLM imports the patched modules.
    """
    if not in_stock_verl():
        wrapt.register_post_import_hook(f"{HOOK}:patch_input_processor", "vllm.v1.engine.input_processor")
        wrapt.register_post_import_hook(f"{HOOK}:patch_model_runner", "vllm.v1.worker.gpu_model_runner")
        models = "vllm.model_executor.models"
        wrapt.register_post_import_hook(minicpmv4_6.apply, f"{models}.minicpmv4_6")
    if detect.is_active():
        vllm_cpu.alias_distribution()
        vllm_cpu.keep_linear_weights()
        experts = "vllm.model_executor.layers.fused_moe.cpu_fused_moe"
        wrapt.register_post_import_hook(vllm_cpu.keep_experts, experts)
        wrapt.register_post_import_hook(vllm_cpu.zero_reused_blocks, "vllm.v1.worker.cpu_model_runner")
