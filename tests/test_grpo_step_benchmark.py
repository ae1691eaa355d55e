# SPDX-License-Identifier: Apache-2.0
"""benchmarks/grpo_step.py: which step is which variant, its tables by hand, and (slow) one round of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "grpo_step.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("of_grpo_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records(benchmark, step_seconds: dict[str, list[float]]) -> dict[int, dict[str, float]]:
    """Metrics of verl's steps; the log-prob pass takes what a step takes beyond 4 s, every other phase 1 s."""
    out, seen = {}, dict.fromkeys(benchmark.VARIANTS, 0)
    for step in range(1, len(benchmark.VARIANTS) * len(step_seconds["verl"]) + 1):
        name = benchmark.variant_of(step)
        seconds = step_seconds[name][seen[name]]
        seen[name] += 1
        data = {f"timing_s/{phase}": 1.0 for phase in (*benchmark.PHASES, "look", "cpu_adv")}
        steps = {"timing_s/step": seconds, "timing_s/cpu_step": 2 * seconds}
        log_probs = {"timing_s/old_log_prob": seconds - 4.0, "timing_s/cpu_old_log_prob": 2 * seconds - 8.0}
        out[step] = {**data, **steps, **log_probs}
    return out


def test_every_round_has_every_variant_and_their_order_changes(benchmark):
    number = len(benchmark.VARIANTS)
    rounds = [[benchmark.variant_of(number * at + place + 1) for place in range(number)] for at in range(20)]
    assert all(sorted(variants) == sorted(benchmark.VARIANTS) for variants in rounds)
    assert {variants[0] for variants in rounds} == set(benchmark.VARIANTS)


def test_ratios_by_hand(benchmark):
    """The first round is left out; of 10, 10 and 20 s, 11, 12 and 21 s are 1.1, 1.2 and 1.05 x."""
    seconds = {name: [99.0, 10.0, 10.0, 20.0] for name in benchmark.VARIANTS}
    seconds["ratio"] = [1.0, 11.0, 12.0, 21.0]
    rows = {row["variant"]: row for row in benchmark.summary(records(benchmark, seconds))}
    assert rows["ratio"]["ratios"] == pytest.approx([1.1, 1.2, 1.05]) and rows["ratio"]["ratio"] == pytest.approx(1.1)
    assert rows["ratio"]["cpu_ratio"] == pytest.approx(1.1) and rows["ratio"]["cpu_added_ratio"] == pytest.approx(1.1)
    assert rows["ratio"]["cpu_log_prob_ratio"] == pytest.approx(14 / 12)
    assert rows["ratio"]["step"] == 12.0 and rows["ratio"]["old_log_prob"] == 8.0 and rows["ratio"]["gen"] == 1.0
    assert rows["verl"]["ratio"] == rows["image_share"]["cpu_added_ratio"] == 1.0
    assert benchmark.interval([float(at) for at in range(20)]) == (2.0, 17.0)


def test_prompts_of_a_round_are_there_once_for_every_variant(benchmark, tmp_path):
    benchmark.write_prompts(tmp_path / "rl.parquet", rounds=2)
    rows = pd.read_parquet(tmp_path / "rl.parquet")
    number, variants = benchmark.NUM_PROMPTS, len(benchmark.VARIANTS)
    assert len(rows) == 2 * number * variants
    images = [row[0]["bytes"] for row in rows["images"]]
    blocks = [images[first : first + number] for first in range(0, len(images), number)]
    assert all(block == blocks[0] for block in blocks[:variants])
    assert all(block == blocks[variants] for block in blocks[variants:]) and blocks[0] != blocks[variants]
    assert {len(row) for row in rows["images"]} == {benchmark.NUM_IMAGES}
    assert {row[-1]["content"].count("<image>") for row in rows["prompt"]} == {benchmark.NUM_IMAGES}


def test_no_round_is_refused():
    done = subprocess.run([sys.executable, str(SCRIPT), "--rounds", "0"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "--rounds must be >= 1; got 0" in done.stderr


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_round(benchmark, tmp_path):
    """Each variant measures what it says."""
    command = [sys.executable, str(SCRIPT), "--rounds", "1", "--limit", "1500", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-6000:]
    report = json.loads((tmp_path / "grpo_step.json").read_text())
    assert len(report["steps"]) == 10 and [row["variant"] for row in report["rows"]] == list(benchmark.VARIANTS)
    measured = {"ratio": {"avar/ratio"}, "image_share": {"avar/ratio"}, "dependency": {"avar/dependency"}}
    for step in report["steps"]:
        assert {"avar/ratio", "avar/dependency"} & set(step) == measured.get(step["variant"], set()), step
        assert step["timing_s/cpu_step"] > step["timing_s/cpu_old_log_prob"] > 0
    assert (tmp_path / "grpo_step.md").read_text().strip() == done.stdout.strip()
