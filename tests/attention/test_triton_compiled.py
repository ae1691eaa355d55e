# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled for GPUs that need not be there: what they use of the registers and tensor cores.

A number that does not fit in the registers lives in local memory, which is device memory; the compiler says so nowhere.
"""

import collections
import re
import subprocess
from pathlib import Path

import pytest
import torch

from avar_verl.attention.lse_mass import KeysByRole
from avar_verl.attention.visibility import Visibility

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.backends.compiler")
kernels = pytest.importorskip("avar_verl.attention.triton_mass")

AMPERE, ADA, HOPPER, BLACKWELL, MI300 = 80, 89, 90, 100, 0
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_MEMORY = {AMPERE: 163 * 1024, ADA: 99 * 1024, HOPPER: 227 * 1024, BLACKWELL: 227 * 1024, MI300: 64 * 1024}

Usage = collections.namedtuple("Usage", "registers local_bytes shared_bytes assembly")

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET compiles nothing")


class Driver:
    """Stands for a GPU of some architecture, whose number is the number of the device."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_device(self):
        return f"compiled for {self.architecture}"  # The key under which Triton keeps the kernels of a device.

    def get_current_stream(self, device):
        return None

    def get_current_target(self):
        if self.architecture == MI300:
            return compiler.GPUTarget("hip", "gfx942", 64)
        return compiler.GPUTarget("cuda", self.architecture, 32)


def usage_of(compiled, folder) -> Usage:
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        registers, local = (
            int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
        )
        return Usage(registers, local, shared, assembly)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report).groups())
    return Usage(registers, stack + local, shared, compiled.asm["ptx"])


@pytest.fixture
def compile_kernels(monkeypatch, tmp_path):
    """`compile_kernels(architecture, dtype, D, layout)` -> {kernel: Usage}: a call, its backward pass, a log-sum-exp.

    The real launches, with their arguments and what Triton makes of them, on tensors of the CPU; nothing runs.
    """
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    names = {f"_{kernel}_kernel": kernel for kernel in kernels.KERNELS}
    run = triton.JITFunction.run

    def compile_for(architecture, dtype, D, layout="causal", S=100):
        if architecture == MI300 and "amd" not in triton.backends.backends:
            pytest.skip("this Triton has no AMD backend")
        compiled = {}

        def compile_only(self, *args, grid, warmup, **kwargs):
            compiled[names[self.fn.__name__]] = run(self, *args, grid=grid, warmup=True, **kwargs)

        B, H, K, Q = 2, 14, 2, 50
        # As the projections of a model leave them; all strides but those of the positions are multiples of 16.
        query = torch.zeros(B, Q, H, D, dtype=dtype).transpose(1, 2).requires_grad_()
        key = torch.zeros(B, S, K, D, dtype=dtype).transpose(1, 2).requires_grad_()
        visibility = Visibility(
            torch.arange(Q).expand(B, Q),
            segment_ids_BS=torch.zeros(B, S, dtype=torch.long) if layout == "packed" else None,
            rows_BQS=torch.ones(B, Q, S, dtype=torch.bool) if layout == "rows" else None,
        )
        with monkeypatch.context() as patch:
            patch.setattr(triton.JITFunction, "run", compile_only)
            patch.setattr(kernels, "_architecture", lambda device: architecture)
            patch.setattr(triton.runtime.driver, "_active", Driver(architecture))
            groups = torch.zeros(B, S, dtype=torch.long)
            kernels.triton_mass(query, key, groups, visibility, D**-0.5, 5).sum().backward()
            lse, span = torch.zeros(B, H, Q), KeysByRole(groups, [1, 2]).span_B1
            kernels.triton_lse_mass(query, key, groups, visibility, D**-0.5, 5, lse, [1, 2], span)
        assert set(compiled) == set(kernels.KERNELS)
        return {kernel: usage_of(result, tmp_path) for kernel, result in compiled.items()}

    return compile_for


def check(usages, architecture, dtype, D):
    for kernel, usage in usages.items():
        limit = 0 if dtype != torch.float32 or D <= 128 else 63
        assert usage.local_bytes <= limit, f"{kernel}: {usage.local_bytes} bytes of local memory"
        assert usage.shared_bytes <= SHARED_MEMORY[architecture], f"{kernel}: {usage.shared_bytes} bytes shared"
        if dtype != torch.float32 and architecture == HOPPER and D <= 256:
            assert "wgmma.mma_async" in usage.assembly, f"{kernel} does not use the tensor cores of Hopper"


@pytest.mark.e2e
def test_the_common_case_on_hopper_stays_in_registers(compile_kernels):
    check(compile_kernels(HOPPER, torch.bfloat16, 128), HOPPER, torch.bfloat16, 128)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "architecture, dtype, D, layout",
    [
        *[(HOPPER, torch.bfloat16, D, "rows") for D in (64, 80, 128, 256)],
        (HOPPER, torch.bfloat16, 96, "packed"),
        (HOPPER, torch.float16, 128, "packed"),
        *[(HOPPER, torch.float32, D, "causal") for D in (128, 256)],
        *[(AMPERE, torch.bfloat16, D, "rows") for D in (64, 128)],
        (AMPERE, torch.float32, 128, "causal"),
        *[(ADA, torch.bfloat16, D, "packed") for D in (256, 512)],
        (BLACKWELL, torch.bfloat16, 128, "rows"),
        *[(MI300, torch.bfloat16, D, "rows") for D in (128, 256)],
    ],
)
def test_nothing_leaves_the_registers(compile_kernels, architecture, dtype, D, layout):
    check(compile_kernels(architecture, dtype, D, layout), architecture, dtype, D)
