# SPDX-License-Identifier: Apache-2.0
"""verl's device platform for a machine without an accelerator.

verl ships platforms for CUDA, ROCm and Ascend (verl/plugin/platform/) and falls back to CUDA when none of them answers
(platform_manager.py::_detect_platform_name). This one is tried after them, so an accelerator always wins.
When it activates: `avar_verl.plugin.compat.cpu.detect`.
"""

from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from avar_verl.plugin.compat.cpu.detect import PLATFORM, is_active


class _CpuDeviceModule(ModuleType):
    """`torch.cpu` plus the memory calls that verl makes on `torch.<device>` wherever it runs.

    verl/workers/engine_workers.py::_postprocess_output and verl/utils/memory_utils.py call them without asking.
    A host has no allocator of its own to report on, so the numbers are 0.
    """

    def __init__(self):
        super().__init__("torch.cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def max_memory_allocated(*_args) -> int:
        return 0

    max_memory_reserved = memory_allocated = memory_reserved = max_memory_allocated

    @staticmethod
    def get_device_name(*_args) -> str:
        return "CPU"  # The name of the host in verl's table of peak FLOPS (utils/flops_counter.py).

    @staticmethod
    def reset_peak_memory_stats(*_args) -> None:
        return

    @staticmethod
    def empty_cache() -> None:
        return

    @staticmethod
    def mem_get_info(*_args) -> tuple[int, int]:
        import psutil

        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def ipc_collect() -> None:
        return

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    # verl saves no state for a device named cpu, but restores one (utils/checkpoint/checkpoint_manager.py:186-219).
    @staticmethod
    def get_rng_state(*_args) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_args) -> None:
        torch.set_rng_state(state)


# Registered where it is defined, as verl's own are: importing this module first imports verl, whose plugin comes here
# before the class exists. A registry entry only: verl asks `is_available` when it picks one.
@PlatformRegistry.register(platform=PLATFORM)
class PlatformCPU(PlatformBase):
    """The host as a verl device. Ray counts it in slots named GPU, one for each training process."""

    _module = _CpuDeviceModule()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return self._module

    def is_available(self) -> bool:
        return is_active()

    def current_device(self) -> torch.device:
        # verl hands this to `.to()` (fsdp/transformer_impl.py::forward_step). The index 0 that the base class speaks
        # of would mean cuda:0 there.
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return

    def synchronize(self, device_index: int | None = None) -> None:
        return

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return

    def empty_cache(self) -> None:
        return

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        # Weights reach the rollout through shared memory (vllm_rollout/bucketed_weight_transfer.py).
        return False

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        return

    def profiler_stop(self) -> None:
        return

    def cudart(self) -> Any:
        return None
