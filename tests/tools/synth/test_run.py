# SPDX-License-Identifier: Apache-2.0
"""`avar synth run` as a process of its own: killed, resumed, and stopped by an endpoint that dies."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from examples.synth import kill_and_resume
from examples.synth.inputs import write_inputs

pytestmark = pytest.mark.e2e


def run(command):
    return subprocess.run(command, capture_output=True, text=True, cwd=kill_and_resume.ROOT, timeout=300)


def test_killed_and_resumed(tmp_path, monkeypatch, capsys):
    """Every input ends in the records, wrong answers are rejected, what was in the cache is not asked for again."""
    monkeypatch.setattr(sys, "argv", ["kill_and_resume", "--work", str(tmp_path / "work"), "--n", "40", "--seed", "1"])
    assert kill_and_resume.main() == 0
    out = json.loads(capsys.readouterr().out)
    assert out["inputs"] == 40 and out["in_cache_after_kill"] > 0 and out["wrong_answers_given"] > 0
    assert out["repeated_unanswered"] <= 64


def test_an_endpoint_that_dies_stops_the_run_and_another_run_goes_on(tmp_path):
    write_inputs(tmp_path / "inputs.parquet", 30)
    quick = ["endpoints.language.backoff_s=0.05", "endpoints.language.max_attempts=3"]
    options = ("--n", "30", "--errors", "0", "--latency", "0.02")
    with kill_and_resume.server(tmp_path, "vision", *options) as (vision, _):
        with kill_and_resume.server(tmp_path, "dying", *options, "--die-after", "10") as (language, process):
            command = kill_and_resume.synth(tmp_path, {"vision": vision, "language": language}, *quick)
            first = run(command)
            assert process.wait(timeout=10) == 3
        assert first.returncode == 1, first.stdout + first.stderr
        assert "avar synth run: endpoint language" in first.stderr and "run again to continue" in first.stderr
        assert "Traceback" not in first.stderr and not (tmp_path / "out" / "sft.parquet").exists()
        paid = kill_and_resume.cached(tmp_path)
        described = kill_and_resume.answered(vision)
        with kill_and_resume.server(tmp_path, "language", *options) as (language, _):
            second = run(kill_and_resume.synth(tmp_path, {"vision": vision, "language": language}, *quick))
            asked = kill_and_resume.answered(language)
        assert second.returncode == 0, second.stdout + second.stderr
        assert kill_and_resume.answered(vision) == described == 30
    assert len(pq.read_table(tmp_path / "out" / "records.parquet", columns=["gate"])) == 30
    # What the dead endpoint has answered is not asked of the new one.
    assert asked == kill_and_resume.cached(tmp_path) - paid and 30 < paid <= 40
