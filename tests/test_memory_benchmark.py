# SPDX-License-Identifier: Apache-2.0
"""benchmarks/memory.py without a launch. Its counts of stored rows: tests/plugin/trainer/test_shared_rollouts.py."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from tensordict import NonTensorData

from benchmarks import memory

MIB = 2**20
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


def test_bytes_are_those_of_what_a_value_holds():
    tokens = torch.zeros(3, dtype=torch.int64)
    assert memory.num_bytes(tokens) == 24 and memory.num_bytes(torch.zeros(1000)[:2]) == 8  # Not of the whole storage.
    nested = torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(5)], layout=torch.jagged)
    assert memory.num_bytes(nested) == 28
    assert memory.num_bytes(Image.new("RGB", (4, 2))) == 24
    assert memory.num_bytes([{"type": "image", "bytes": b"12345"}, "ab"]) == 4 + 5 + 5 + 5 + 2
    assert memory.num_bytes(NonTensorData({"a": b"12"})) == 3


def test_processes_have_roles():
    actors = {"ray::IDLE": "", "ray::WorkerDict.actor_update": "WorkerDict"}
    actors |= {f"ray::{name}.generate": "AgentLoopWorker" for name in ("AgentLoopWorkerTQ", "AvarAgentLoopWorker")}
    for title, role in actors.items():
        assert memory.role_of([title]) == role
    assert memory.role_of(["python", "-m", "verl.trainer.main_ppo", "x=1"]) == "launcher"
    assert memory.role_of(["/lib/ray/raylet/raylet", "--x"]) == "ray: raylet"
    assert memory.role_of(["/bin/sleep", "1"]) == "sleep" and memory.role_of([]) == ""


def test_the_peak_of_a_process_is_seen():
    """Of a process that a process has started, after it has given its memory back."""
    held = "x = bytearray(200 << 20); import time; time.sleep(1); del x; time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    process = subprocess.Popen([sys.executable, "-c", code])
    watch = memory.Watch(process.pid)
    process.wait()
    peaks = watch.stop()
    together = peaks.pop("all at once")
    assert 200 << 20 < together <= sum(peaks.values()) < 300 << 20


def test_tables():
    results = {
        "settings": {"image": "8x8", "prompts": 1, "n": 2, "steps": 1},
        "variants": {
            "verl": {"bytes": {"pixels": 3072.0, "ids": 1024.0, "uid": 4.0}, "rss": {"worker": 300 * MIB, "sh": MIB}},
            "avar": {"bytes": {"pixels": 1024.0, "ids": 1024.0}, "rss": {"worker": 200 * MIB}},
        },
    }  # fmt: skip
    text = memory.report(results)
    assert "| pixels | 3.00 | 1.00 |" in text and "| other | 0.00 | 0.00 |" in text
    assert "| all | 4.00 | 2.00 |" in text and "| verl / this | 1.00 x | 2.00 x |" in text
    assert "| worker | 300.00 | 200.00 |" in text and "| other | 1.00 | 0.00 |" in text


def test_other_sizes_and_unknown_variants_are_refused(tmp_path):
    def run(*arguments: str) -> str:
        command = [sys.executable, str(SCRIPT), *arguments, "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        return done.stderr

    assert "variants must be of" in run("--variants", "verl,nobodys")
    (tmp_path / "memory.json").write_text(json.dumps({"settings": {"n": 3}, "variants": {}}))
    assert "is of other sizes" in run("--variants", "avar")


def test_every_variant_composes(tmp_path):
    """The recipe's runs pass its own checks, and verl's has nothing of avar."""
    from avar_verl.plugin.refusals import check_run
    from tests.plugin.test_config import recipe
    from tests.plugin.test_refusals import MAIN_PPO

    settings = argparse.Namespace(prompts=4, n=8, steps=2)
    for variant in memory.VARIANTS:
        words = memory.command(variant, tmp_path, settings)[4:]
        config = recipe(words[0], *(word for word in words[1:] if not word.startswith("hydra.")))
        assert ("avar" in config) == (variant != "verl")
        assert (config.data.custom_cls.path is None) == (variant in ("verl", "avar_alone"))
        if variant != "verl":
            check_run(config, MAIN_PPO, words[1:])
