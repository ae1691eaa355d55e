# SPDX-License-Identifier: Apache-2.0
"""Several workers, a kill, and responses that no template has written."""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from avar_verl.tools.demo import photo_grid
from avar_verl.tools.rows import conversation, read
from avar_verl.tools.vas.command import Vas
from avar_verl.tools.vas.run import run_vas
from avar_verl.tools.vas.score import Scorer
from tests.tools.vas.conftest import assert_same
from tests.tools.vas.test_score import reference

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sft.parquet"
    photo_grid.make_sft_parquet(path, 40, 0, "test")
    return str(path)


@pytest.fixture(scope="module")
def alone(tiny_model_path, data):
    """What one process that runs through measures."""
    return run_vas(Vas(str(tiny_model_path), data, dependency="swap", batch_size=4))


@pytest.fixture
def cluster(tmp_path_factory):
    """A Ray of its own, small, with two places for actors."""
    ray = pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets need short paths.
    try:
        yield ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=2**27, _temp_dir=folder)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_two_actors_measure_what_one_process_does(tiny_model_path, data, alone, cluster, tmp_path):
    settings = {"dependency": "swap", "batch_size": 4, "show": 2, "ray": 2}
    summary = run_vas(Vas(str(tiny_model_path), data, **settings, out=tmp_path / "out"))
    assert summary["num_rows"] == 40
    # Not one digit differs: the batches are the same, and so is the order in which records are summed.
    assert summary["queries"] == alone["queries"] and summary["samples"] == alone["samples"]
    assert summary["dependency"] == alone["dependency"] and summary["dependency"]["num_samples"] == 40
    assert len(json.loads((tmp_path / "out" / "words.json").read_text())["samples"]) == 2

    with pytest.raises(ValueError, match="one CPU of the Ray cluster; got --ray 3 for 2"):
        run_vas(Vas(str(tiny_model_path), data, ray=3))

    # A row that an actor cannot measure is the error that one process raises.
    rl = tmp_path / "rl.parquet"
    photo_grid.make_rl_parquet(rl, 2, 0)
    with pytest.raises(ValueError, match="row 0 of .*rl.parquet: response queries need a response"):
        run_vas(Vas(str(tiny_model_path), str(rl), ray=1))


def test_a_killed_run_goes_on_without_repeating_a_sample(tiny_model_path, data, alone, tmp_path):
    records = tmp_path / "records.jsonl"
    arguments = ["--model", str(tiny_model_path), "--data", data, "--out", str(tmp_path), "--device", "cpu"]
    arguments += ["--dependency", "swap"]
    command = [sys.executable, "-m", "avar_verl", "vas", *arguments, "--batch-size", "4"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    summary = run_vas(Vas(str(tiny_model_path), data, dependency="swap", batch_size=4, show=2, out=tmp_path))
    lines = records.read_bytes().splitlines(keepends=True)
    whole = [line for line in kept if line.endswith(b"\n")]
    assert lines[: len(whole)] == whole and sorted(json.loads(line)["row"] for line in lines) == list(range(40))
    assert_same(summary["queries"], alone["queries"])
    value, expected = (one["dependency"]["overall"]["value"] for one in (summary, alone))
    assert value == pytest.approx(expected, abs=1e-6)
    assert (tmp_path / "vas.json").exists() and (tmp_path / "report.html").exists()


def test_responses_of_any_policy(tiny_model_path, role_map, eager_checkpoint, family_checkpoint, tmp_path):
    """Whatever ids a policy has sampled, scored here: what the full matrix of the same tokens says."""
    rows = tmp_path / "rows.jsonl"
    forbidden = set(role_map.image_token_ids)  # As in rollouts.
    choice = random.Random(0)
    with rows.open("w") as file:
        for sample in photo_grid.make_samples(4, 0, "test"):
            sample.image.save(tmp_path / f"{sample.index}.png")
            ids = [choice.randrange(200) for _ in range(choice.randrange(1, 24))]
            row = {"prompt": [{"role": "user", "content": f"<image>{sample.question}"}]}
            row |= {"images": [str(tmp_path / f"{sample.index}.png")]}
            row |= {"response_ids": [token for token in ids if token not in forbidden]}
            file.write(json.dumps(row) + "\n")
    summary = run_vas(Vas(str(tiny_model_path), str(rows), batch_size=3))
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
