# SPDX-License-Identifier: Apache-2.0
"""`avar rewards score`: files, table, histogram, highlighted anchors, and what is refused."""

import io
import json
import subprocess
import sys

import pandas as pd
import pytest
from rich.console import Console

from avar_verl.tools.rewards.command import Score
from avar_verl.tools.rewards.offline import (
    SHIPPED,
    highlighted,
    histogram,
    load_reward,
    read_rollouts,
    score_file,
    summary,
)

RIGHT = "<think>In the image there is a cup at [40, 60, 90, 120].</think><answer>4</answer>"
ROWS = [
    {"output": RIGHT, "gts": "4", "score": 0.0},
    {"output": "<think>no</think><answer>5</answer>", "gts": "4", "score": 0.0},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.e2e
def test_the_command(tmp_path):
    data, out = write(tmp_path / "rollouts.jsonl", ROWS), tmp_path / "parts.jsonl"
    command = [sys.executable, "-m", "avar_verl", "rewards", "score", str(data), "--out", str(out), "--show", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "visual_anchor on 2 rollouts" in done.stdout and "num_distinct_anchors" in done.stdout
    assert "bbox    [40, 60, 90, 120]" in done.stdout and "phrase  In the image" in done.stdout
    parts = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in parts] == [0, 1] and [row["acc"] for row in parts] == [1.0, 0.0]
    done = subprocess.run([*command[:5], str(tmp_path / "none.jsonl")], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_kinds_of_files(tmp_path, suffix):
    rows = [
        {"response": RIGHT, "reward_model": {"ground_truth": "4"}, "data_source": "cups", "extra_info": {"index": 9}}
    ]
    path = tmp_path / f"rollouts.{suffix}"
    pd.DataFrame(rows).to_parquet(path) if suffix == "parquet" else write(path, rows)
    (row,) = read_rollouts(path)
    assert row == {
        "data_source": "cups",
        "solution_str": RIGHT,
        "ground_truth": "4",
        "extra_info": {"index": 9},
    }


def test_settings_limit_and_a_users_file(tmp_path):
    (tmp_path / "mine.py").write_text("def compute_score(solution_str, scale=1.0, **rest):\n    return scale\n")
    console = Console(file=io.StringIO(), width=100)
    data = write(tmp_path / "rollouts.jsonl", ROWS)
    assert score_file(Score(data, str(tmp_path / "mine.py"), {"scale": 3.0}, n=1, show=0), console) == 1
    assert "3.000" in console.file.getvalue()


def test_summary_and_histogram_by_hand():
    assert summary([{"a": 1.0, "b": "x"}, {"a": 3.0, "b": "y"}]) == {
        "a": {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0, "n": 2}
    }
    bins = histogram([0.0, 0.05, 0.95, 1.0])
    assert [count for *_, count in bins] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert histogram([0.5, 0.5]) == [(0.5, 0.5, 2)]


def test_anchors_are_highlighted():
    spans = {(span.start, span.end) for span in highlighted(RIGHT).spans}
    assert {RIGHT[a:b] for a, b in spans} == {"In the image", "[40, 60, 90, 120]"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_reward_is_found(name):
    assert load_reward(name).__module__ == f"reward_fns.{name}"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "", "data are read from .parquet, .jsonl, .json files"),
        ("a.jsonl", "{\n", "line 1 of .* must be JSON"),
        ("a.jsonl", "[1]\n", "line 1 of .* must be a JSON object; got list"),
        ("a.jsonl", '{"text": "x"}\n', "a rollout needs a response, one of the columns .* in row 0"),
        ("a.jsonl", '{"output": "x"}\n', "a rollout needs a ground truth, one of the columns"),
        ("a.jsonl", '{"output": 3, "gts": "4"}\n', "a response is text; got int in row 0"),
        ("a.jsonl", "", "must have rows; got none"),
        ("a.jsonl", '{"output": "x", "gts": ""}\n', "row 0 of .*: "),
    ],
)
def test_bad_files_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        score_file(Score(path, "avar"), Console(file=io.StringIO()))


def test_unknown_rewards_are_refused():
    with pytest.raises(ValueError, match="a reward is one of .*; got 'vissual'"):
        load_reward("vissual")
