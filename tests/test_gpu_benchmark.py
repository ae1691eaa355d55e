# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py on a machine without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


def test_a_dry_run_lists_the_parts():
    done = run("--dry-run")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        *("lse", "models", "packed", "profile", "attention", "synchronisations", "kernels", "compiled", "engine"),
        *("intervention", "blocks", "total"),
    ]


def test_an_unknown_part_is_refused():
    done = run("--parts", "attention,nonsense")
    assert done.returncode == 1 and "got ['nonsense']" in done.stderr


@pytest.mark.e2e
def test_parts_are_measured_or_say_why_not(tmp_path):
    done = run("--device", "cpu", "--small", "--parts", "lse,models,packed,attention,blocks", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    parts = {part["name"]: part for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]}
    assert {parts[name]["status"] for name in ("lse", "attention", "models")} == {"measured"}
    assert all(row["mass_error"] < 1e-5 and row["output_changed"] == 0 for row in parts["lse"]["rows"])
    assert parts["packed"]["status"].startswith("skipped, needs a CUDA device")
    assert parts["blocks"]["status"] == "skipped, needs a CUDA device"
    rows = {row["variant"]: row for row in parts["models"]["rows"] if row["model"] == "Qwen3-VL-8B"}
    assert rows["+ AGTO"]["ms"] > 0 and rows["+ VARS"]["ms"] > 0
    assert rows["+ VARS, lse"]["ms"] > 0 and rows["+ VARS and dependency"]["ms"] > 0
    assert "### blocks: skipped, needs a CUDA device" in (tmp_path / "gpu.md").read_text()
