# SPDX-License-Identifier: Apache-2.0
"""`avar doctor`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avar_verl.tools.options import Command, Size, Words


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Check a model before spending GPU time on it; exit code 1 if a check fails (docs/doctor.md)."""

    model: str | None = None  # Hugging Face folder. Give this or --env.
    env: bool = False  # Compare the installed packages with the tested ones, without a model.
    data: Path | None = None  # File of training rows, rendered by this model as by `avar data check`.
    rollout: bool = False  # Start vLLM and compare it with transformers.
    device: Literal["cpu", "cuda"] = "cpu"  # Where the model runs.
    gpus: Size = 1  # Number of GPUs for training.
    gpu_memory: float | None = None  # GiB per GPU: warn if training needs more.
    only: Words = None  # Names of checks to run, together with the ones they need. If omitted: all.
    out: Path | None = None  # Write the results to this JSON file.

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) != self.env:
            both = "both" if self.env else "neither"
            raise ValueError(f"avar doctor needs --model or --env; got {both}. Give one.")

    def run(self) -> None:
        if self.env:
            from avar_verl.tools.doctor.env import run_env

            sys.exit(run_env())
        from rich.console import Console

        from avar_verl.tools.doctor.run import run_doctor

        if not run_doctor(self, Console()):
            sys.exit(1)
