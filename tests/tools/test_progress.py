# SPDX-License-Identifier: Apache-2.0
"""A bar on a terminal; in a log few lines, whatever the number of refreshes."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from avar_verl.tools.progress import progress, say

# Two bars side by side, refreshed twenty times a second for 1.2 s, with a line of the log every 0.5 s.
CODE = """
import time
from avar_verl.tools import progress
progress.LOG_SECONDS = 0.5
with progress.progress(total=24, desc="sft", unit="step") as sft, progress.progress(total=48, desc="agto") as agto:
    for step in range(24):
        sft.update()
        agto.update(2)
        sft.set_postfix_str(f"loss {step}")
        sft.refresh()
        time.sleep(0.05)
"""


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end():
    done = subprocess.run([sys.executable, "-c", CODE], stderr=subprocess.PIPE, timeout=120, check=True)
    text = done.stderr.decode()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n") and "\n\n" not in text
    for name, last in (("sft", "24/24"), ("agto", "48/48")):
        lines = [line for line in text.splitlines() if line.startswith(f"{name}:")]
        assert 3 <= len(lines) <= 10, text  # Of 72 refreshes; a busy machine takes longer for them.
        assert last in lines[-1] and last not in lines[0]
    assert "loss" in text


def test_a_loop_that_waits_writes_the_line_that_is_due():
    code = "\n".join(
        [
            "import time",
            "from avar_verl.tools import progress",
            "progress.LOG_SECONDS = 0.3",
            "with progress.progress(total=5, desc='wait') as bar:",
            "    for _ in range(20):",
            "        bar.update(0)",
            "        time.sleep(0.05)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=120, check=True)
    assert 3 <= len(re.findall(r"^wait: .*0/5.*$", done.stderr.decode(), re.M)) <= 10, done.stderr


def test_a_short_loop_gets_one_line(capsys):
    assert list(progress(range(1000), "count", unit="row")) == list(range(1000))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("count: 100%") and "1000/1000" in line


def test_a_terminal_gets_a_bar():
    """Both bars are drawn over themselves, in two lines."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", CODE], stderr=other)
    os.close(other)
    text = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux's end of a terminal.
            break
        if not part:
            break
        text += part
    assert process.wait(timeout=120) == 0
    os.close(main)
    text = text.decode()
    for name in ("sft", "agto"):
        assert text.count(f"\r{name}:") > 8, text
    assert "\x1b[A" in text and text.count("\n") < text.count("\r")


def test_text_of_a_loop_is_not_mixed_with_its_lines(capsys):
    with progress(total=2, desc="answers") as bar:
        for number in range(2):
            say(f"answer {number}")
            bar.update()
    out, err = capsys.readouterr()
    assert out == "answer 0\nanswer 1\n" and err.count("\n") == 1 and "\r" not in err


def test_the_last_line_is_not_written_twice(capsys, monkeypatch):
    """The line that is due comes with the last step."""
    monkeypatch.setattr("avar_verl.tools.progress.LOG_SECONDS", 0.2)
    with progress(total=1, desc="due") as bar:
        time.sleep(0.3)
        bar.update()
    assert capsys.readouterr().err.count("due: 100%") == 1


@pytest.mark.parametrize("total", [None, 0])
def test_a_loop_without_steps(capsys, total):
    with progress(total=total, desc="none"):
        pass
    assert capsys.readouterr().err.count("\n") == 1
