# SPDX-License-Identifier: Apache-2.0
"""Several workers, a kill, and responses of vLLM, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avar_verl.demo import photo_grid
from avar_verl.vas.rows import conversation, read
from avar_verl.vas.run import VasSettings, run_vas
from avar_verl.vas.score import Scorer
from tests.vas.conftest import assert_same
from tests.vas.test_score import reference

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sft.parquet"
    photo_grid.make_sft_parquet(path, 40, 0, "test")
    return str(path)


@pytest.fixture(scope="module")
def alone(tiny_model_path, data):
    """What one process that runs through measures."""
    return run_vas(VasSettings(str(tiny_model_path), data, batch_size=4), None)


def command(model, data, out, *options) -> list[str]:
    arguments = ["--model", str(model), "--data", data, "--out", str(out), "--batch-size", "4", "--show", "2"]
    return [sys.executable, "-m", "avar_verl.cli", "vas", *arguments, "--device", "cpu", *options]


def finished(process: subprocess.CompletedProcess) -> None:
    assert process.returncode == 0, (process.stdout + process.stderr)[-4000:]


def test_two_actors_measure_what_one_process_does(tiny_model_path, data, alone, tmp_path):
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": "/tmp", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command(tiny_model_path, data, tmp_path, "--ray", "2"),
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    finished(run)
    summary = json.loads((tmp_path / "vas.json").read_text())
    assert summary["num_rows"] == 40
    # Not one digit differs: the batches are the same, and so is the order in which records are summed.
    assert summary["queries"] == alone["queries"] and summary["samples"] == alone["samples"]
    assert len(json.loads((tmp_path / "words.json").read_text())["samples"]) == 2

    # A finished measurement starts no actor, and a row that cannot be read is named by the driver.
    photo_grid.make_rl_parquet(tmp_path / "rl.parquet", 2, 0)
    failing = command(tiny_model_path, str(tmp_path / "rl.parquet"), tmp_path / "other", "--ray", "1")
    run = subprocess.run(failing, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "row 0 of" in run.stderr and "Pass --generate" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_killed_run_goes_on_without_repeating_a_sample(tiny_model_path, data, alone, tmp_path):
    records = tmp_path / "records.jsonl"
    process = subprocess.Popen(
        command(tiny_model_path, data, tmp_path), cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (records.exists() and records.read_bytes().count(b"\n") >= 8):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = records.read_bytes().splitlines(keepends=True)
    assert 8 <= len(kept) < 40 and not (tmp_path / "vas.json").exists()
    finished(subprocess.run(command(tiny_model_path, data, tmp_path), cwd=REPOSITORY, capture_output=True, text=True))
    lines = records.read_bytes().splitlines(keepends=True)
    whole = [line for line in kept if line.endswith(b"\n")]
    assert lines[: len(whole)] == whole and sorted(json.loads(line)["row"] for line in lines) == list(range(40))
    summary = json.loads((tmp_path / "vas.json").read_text())
    assert_same(summary["queries"], alone["queries"])
    assert (tmp_path / "report.html").exists()


def test_responses_of_vllm(tiny_model_path, eager_checkpoint, family_checkpoint, tmp_path):
    """Sampled by vLLM from the same model, scored here: what the full matrix of the same tokens says."""
    pytest.importorskip("vllm")
    rows = tmp_path / "rows.jsonl"
    worker = [sys.executable, "-m", "tests.vas.vllm_worker", str(tiny_model_path), str(rows)]
    finished(subprocess.run(worker, cwd=REPOSITORY, capture_output=True, text=True))
    summary = run_vas(VasSettings(str(tiny_model_path), str(rows), batch_size=3), None)
    lengths = [len(row.values["response_ids"]) for row in read(str(rows))]
    assert summary["queries"]["response"]["num_queries"] == sum(lengths) and min(lengths) >= 1
    scorer = Scorer(family_checkpoint("qwen2_5_vl"))
    for number, row in enumerate(read(str(rows))):
        [sample] = scorer.prepare([conversation(row.values)])
        expected = reference(eager_checkpoint("qwen2_5_vl"), sample, scorer.layers)
        for key in ("ratio", "share", "image", "system"):
            part = expected["response"][key]
            mean = sum(map(sum, part)) / sum(map(len, part))
            assert summary["samples"]["response"][key][number] == pytest.approx(mean, rel=1e-5)
