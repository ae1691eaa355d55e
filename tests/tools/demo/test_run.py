# SPDX-License-Identifier: Apache-2.0
"""Stages in processes of their own: their steps, their seconds, and what is said when one fails."""

import json
import sys
from types import SimpleNamespace

import pytest

from avar_verl.tools.demo.run import Demo, DemoSettings

# In place of a trainer of verl: three steps in its file log.
TRAINER = """
import os, time
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as log:
    assert os.environ["RAY_ADDRESS"] == "local"  # whatever cluster runs on this machine
    for step in range(1, 4):
        time.sleep(0.3)
        log.write(f'{{"step": {step}, "data": {{}}}}\\n')
        log.flush()
"""


def test_stages_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    demo = Demo(tmp_path, DemoSettings())
    commands = {name: [sys.executable, "-c", TRAINER] for name in ("sft", "agto")}
    seconds = demo._launch(commands, steps=3)
    assert seconds.keys() == commands.keys() and all(0.9 < value < 60 for value in seconds.values())
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["agto", "sft"]
    assert all("3/3" in line for line in lines)


def test_a_killed_training_keeps_its_steps_and_a_finished_one_is_not_run_again(tmp_path):
    """The first trainer logs three steps; the killed one before it had logged the first and a half of the second."""
    demo = Demo(tmp_path, DemoSettings())
    log = tmp_path / "logs" / "sft.jsonl"
    log.write_text('{"step": 0, "data": {"run": "killed"}}\n{"step": 1, "data": {"run": "killed"}}\n{"step": 2, "da')
    seconds = demo.train({"sft": [sys.executable, "-c", TRAINER]}, steps=3)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert [one["step"] for one in steps] == [0, 1, 2, 3]
    assert [one["data"] for one in steps] == [{"run": "killed"}, {}, {}, {}]
    assert Demo(tmp_path, DemoSettings()).train({"sft": ["false"]}, steps=3) == seconds


def test_a_stage_that_fails_ends_the_others_and_shows_its_log(tmp_path):
    demo = Demo(tmp_path, DemoSettings())
    commands = {"sft": [sys.executable, "-c", "raise SystemExit('no memory')"], "agto": ["sleep", "600"]}
    with pytest.raises(RuntimeError, match=r"stage sft failed with exit code 1; log: .*sft\.log\nno memory"):
        demo._launch(commands, steps=3)


@pytest.mark.parametrize(("free", "one_by_one"), [(40, False), (12, True)])
def test_grpo_runs_share_the_memory_or_take_turns(tmp_path, monkeypatch, capsys, free, one_by_one):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free * 2**30))
    demo = Demo(tmp_path, DemoSettings(grpo_steps=3))
    alone = "import os; assert not os.path.exists('running'); open('running', 'w'); {}; os.remove('running')"
    code = alone.format(f"exec({TRAINER!r})") if one_by_one else TRAINER
    seconds = demo._reinforce({name: [sys.executable, "-c", code] for name in ("grpo", "avar")})
    assert seconds.keys() == {"grpo", "avar"}
    assert (f"{free} GiB of memory are free, 18 needed" in capsys.readouterr().out) == one_by_one


def test_a_folder_holds_one_run(tmp_path):
    Demo(tmp_path, DemoSettings())
    assert json.loads((tmp_path / "settings.json").read_text())["sft_steps"] == 200
    Demo(tmp_path, DemoSettings())
    with pytest.raises(ValueError, match="other settings; got sft_steps: 200 there, 7 now"):
        Demo(tmp_path, DemoSettings(sft_steps=7))
