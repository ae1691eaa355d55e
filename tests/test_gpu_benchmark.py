# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py on a machine without a GPU."""

import json
import re
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
        *("lse", "models", "packed", "profile", "attention", "synchronisations", "kernels", "compiled"),
        *("intervention", "engine", "blocks", "total"),
    ]


def test_an_unknown_part_is_refused():
    done = run("--parts", "attention,nonsense")
    assert done.returncode == 1 and "got ['nonsense']" in done.stderr


@pytest.mark.e2e
def test_every_part_is_measured_or_says_why_not(tmp_path):
    done = run("--device", "cpu", "--small", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    parts = {part["name"]: part for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]}
    needs = {name: part["status"] for name, part in parts.items() if part["status"] != "measured"}
    assert sorted(needs) == ["blocks", "packed", "profile", "synchronisations"]
    assert all(status.startswith("skipped, needs a CUDA device") for status in needs.values())
    assert all(row["mass_error"] < 1e-5 and row["output_changed"] == 0 for row in parts["lse"]["rows"])
    rows = {row["variant"]: row for row in parts["models"]["rows"] if row["model"] == "Qwen3-VL-8B"}
    assert rows["+ AGTO"]["ms"] > 0 and rows["+ VARS"]["ms"] > 0
    assert rows["+ VARS, lse"]["ms"] > 0 and rows["+ VARS and dependency"]["ms"] > 0
    assert {row["variant"] for row in parts["attention"]["rows"]} >= {"+ AGTO, chunked", "+ VARS, chunked"}
    (compiled,) = parts["compiled"]["rows"]
    assert compiled["mass_error"] < 1e-5
    padded, packed = parts["engine"]["rows"]
    assert padded["losses"][0] > padded["losses"][-1] > 0
    assert packed["variant"] == "cpu, packed, fp32"
    assert packed["loss_difference"] < 1e-5 and packed["r_visual_difference"] < 1e-5
    for name in ("kernels", "intervention"):
        (row,) = parts[name]["rows"]
        assert re.fullmatch(r"[1-9]\d* passed(, \d+ deselected)? in .*", row["result"]), row
    assert "### blocks: skipped, needs a CUDA device" in (tmp_path / "gpu.md").read_text()
