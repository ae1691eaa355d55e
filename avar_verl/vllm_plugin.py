# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.general_plugins`: called in every vLLM process before it builds a model. Does not import verl."""

from avar_verl.compat import detect, vllm_cpu


def register() -> None:
    """On the CPU, make vLLM answer to its name and keep weights that can be updated. Elsewhere, nothing."""
    if detect.is_active():
        vllm_cpu.alias_distribution()
        vllm_cpu.keep_linear_weights()
