# SPDX-License-Identifier: Apache-2.0
"""Stages in processes of their own: their steps, their seconds, and what is said when one fails."""

import json
import sys

import pytest

from avar_verl.tools.demo.run import Demo, DemoSettings

# In place of a trainer of verl: three steps in its file log.
TRAINER = """
import os, time
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as log:
    for step in range(1, 4):
        time.sleep(0.3)
        log.write(f'{{"step": {step}, "data": {{}}}}\\n')
        log.flush()
"""


def test_stages_side_by_side(tmp_path, capsys):
    demo = Demo(tmp_path, DemoSettings())
    commands = {name: [sys.executable, "-c", TRAINER] for name in ("sft", "agto")}
    seconds = demo._launch(commands, steps=3)
    assert seconds.keys() == commands.keys() and all(0.9 < value < 60 for value in seconds.values())
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["agto", "sft"]
    assert all("3/3" in line for line in lines)


def test_a_stage_that_fails_ends_the_others_and_shows_its_log(tmp_path):
    demo = Demo(tmp_path, DemoSettings())
    commands = {"sft": [sys.executable, "-c", "raise SystemExit('no memory')"], "agto": ["sleep", "600"]}
    with pytest.raises(RuntimeError, match=r"stage sft failed with exit code 1; log: .*sft\.log\nno memory"):
        demo._launch(commands, steps=3)


def test_a_folder_holds_one_run(tmp_path):
    Demo(tmp_path, DemoSettings())
    assert json.loads((tmp_path / "settings.json").read_text())["sft_steps"] == 200
    Demo(tmp_path, DemoSettings())
    with pytest.raises(ValueError, match="other settings; got sft_steps: 200 there, 7 now"):
        Demo(tmp_path, DemoSettings(sft_steps=7))
