# SPDX-License-Identifier: Apache-2.0
"""Starting and stopping a server; small programs stand for vLLM, but for the last test."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest
import torch

from avar_verl.model.checkpoint import Checkpoint
from avar_verl.model.render import render
from avar_verl.tools.demo import photo_grid
from avar_verl.tools.evaluate.server import NAME, cpu_environment, free_port, running_server, server_command
from avar_verl.tools.questions import Question
from avar_verl.tools.rows import conversation
from tests.data.odd_images import ODD_IMAGES

# Processes that start and end, and waits for them.
pytestmark = pytest.mark.e2e

# A server with a child of its own, as vLLM has; both ignore nothing.
PROGRAM = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(what, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def child_of(log: Path) -> int:
    return int(log.read_text().split()[1])


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_server_and_its_children_end_with_the_block(tmp_path, error):
    port, log = free_port(), tmp_path / "log"
    try:
        with running_server([sys.executable, "-c", PROGRAM, str(port)], port, log, timeout_s=60) as server:
            assert server.url == f"http://127.0.0.1:{port}/v1"
            server.check()
            pids = server.process.pid, child_of(log)
            assert not any(map(gone, pids))
            if error:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    wait_for(lambda: all(map(gone, pids)), 10)


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "import sys; print('no memory left'); sys.exit(3)"]
    with pytest.raises(RuntimeError, match="vLLM ended with exit code 3; log: .*\nno memory left"):
        with running_server(command, free_port(), tmp_path / "log", timeout_s=60):
            pass


def test_a_server_that_dies_later_is_noticed(tmp_path):
    port = free_port()
    with running_server([sys.executable, "-c", PROGRAM, str(port)], port, tmp_path / "log", timeout_s=60) as server:
        server.process.kill()
        server.process.wait()
        with pytest.raises(RuntimeError, match="vLLM ended with exit code -9"):
            server.check()
    wait_for(lambda: gone(child_of(tmp_path / "log")), 10)


def test_a_server_that_does_not_answer_is_given_up(tmp_path):
    command = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    with pytest.raises(RuntimeError, match="must answer within 3 s .*\nloading"):
        with running_server(command, free_port(), tmp_path / "log", timeout_s=3):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at the parent's death is Linux's")
def test_the_server_ends_with_a_killed_client(tmp_path):
    port, log = free_port(), tmp_path / "log"
    code = (
        "import sys, time; from pathlib import Path; from avar_verl.tools.evaluate.server import running_server\n"
        f"command = [sys.executable, '-c', {PROGRAM!r}, '{port}']\n"
        f"with running_server(command, {port}, Path({str(log)!r}), timeout_s=60) as s:\n"
        "    print(s.process.pid, flush=True)\n"
        "    time.sleep(600)"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pid = int(client.stdout.readline())
    client.kill()
    client.wait()
    wait_for(lambda: gone(pid), 10)
    os.kill(child_of(log), signal.SIGKILL)  # This program's child has no such wish; vLLM's watch their parent.


def test_the_command_line():
    command = server_command(Path("/m"), 1234, num_images=3, cpu=True, max_model_len=512, extra=["--seed", "1"])
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--limit-mm-per-prompt") + 1] == '{"image": 3, "video": 0}'
    assert command[command.index("--max-model-len") + 1] == "512"
    assert "--enforce-eager" in command and command[-2:] == ["--seed", "1"]
    gpu = server_command(Path("/m"), 1234, num_images=1, cpu=False, max_model_len=None)
    assert not {"--enforce-eager", "--dtype", "--max-model-len", "--skip-mm-profiling"} & set(gpu)


def test_the_environment_has_the_last_word(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert "VLLM_CPU_KVCACHE_SPACE" not in cpu_environment()
    assert cpu_environment()["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def question(value: dict) -> Question:
    return Question("odd", "0", ({"role": "user", "content": "<image>What is top left?"},), (value,), ("x",))


def prompt_of(url: str, item: Question) -> tuple[list[int], list[float]]:
    """Ids of a question's prompt on the server, and their log-probabilities from the second on."""
    reply = openai.OpenAI(base_url=url, api_key="none").chat.completions.create(
        model=NAME,
        messages=item.chat(),
        max_tokens=1,
        temperature=0.0,
        extra_body={"prompt_logprobs": 0, "return_token_ids": True},
    )
    extra = reply.model_extra
    ids, by_position = extra["prompt_token_ids"], extra["prompt_logprobs"][1:]
    return ids, [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], by_position, strict=True)]


def check_pictures(answers: dict[str, tuple[list[int], list[float]]], model: Path) -> None:
    """The server saw what training sees: the same ids, with the log-probabilities of transformers."""
    checkpoint = Checkpoint.load(model)
    found = {}
    for name, (ids, logprobs) in answers.items():
        row = {"messages": [{"role": "user", "content": "<image>What is top left?"}], "images": [ODD_IMAGES[name]]}
        rendered = render(checkpoint.processor, conversation(row).prompt, add_generation_prompt=True)
        assert ids == rendered.ids_S.tolist(), name
        with torch.no_grad():
            logits_SV = checkpoint.model(**checkpoint.collate([rendered])).logits[0]
        found[name] = logits_SV[:-1].log_softmax(-1).gather(1, rendered.ids_S[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), found[name], atol=1e-3, rtol=0, msg=name)
    turned, upright = found["EXIF 3"], found["RGBA"]
    assert turned.shape == upright.shape and float((turned - upright).abs().max()) > 1e-2, "the test cannot fail"


def test_photo_grid_on_vllm_killed_and_resumed(tmp_path, tiny_model_path):
    """`avar eval` on a real server, both killed in the middle; run again, every item has one record. The second server
    is also asked about images that programs open in different ways.
    """
    data, out = tmp_path / "grid.parquet", tmp_path / "out"
    photo_grid.make_rl_parquet(data, 24, 7, "test")
    records = out / "grid" / "records.jsonl"
    command = [sys.executable, "-m", "avar_verl", "eval", "--model", str(tiny_model_path), "--data", str(data)]
    command += ["--out", str(out), "--max-tokens", "24", "--concurrency", "2", "--max-model-len", "256"]
    limits = "--max-num-seqs 2 --max-num-batched-tokens 256"
    command += [f"--server-args={limits}"]

    def lines() -> list[bytes]:
        return records.read_bytes().split(b"\n")[:-1] if records.exists() else []

    def log() -> str:
        return (out / "server.log").read_text(errors="replace")[-6000:] if (out / "server.log").exists() else ""

    with (tmp_path / "first.log").open("wb") as file:
        client = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 600
        while len(lines()) < 4:
            assert client.poll() is None, (tmp_path / "first.log").read_text()[-6000:] + log()
            assert time.monotonic() < deadline, log()
            time.sleep(0.02)
        # The server has a session of its own: with the client killed the kernel tells it, and its engine watches it.
        family = psutil.Process(client.pid).children(recursive=True)
        client.kill()
        client.wait()
    kept = lines()
    assert 4 <= len(kept) < 24
    wait_for(lambda: all(gone(process.pid) for process in family), 60)
    port = free_port()
    start = server_command(tiny_model_path, port, num_images=1, cpu=True, max_model_len=256, extra=limits.split())
    with running_server(start, port, tmp_path / "server.log", timeout_s=600, environment=cpu_environment()) as server:
        done = subprocess.run([*command, "--server-url", server.url], capture_output=True, text=True, timeout=600)
        answers = {name: prompt_of(server.url, question(value)) for name, value in ODD_IMAGES.items()}
    assert done.returncode == 0, done.stderr[-3000:] + log()
    check_pictures(answers, tiny_model_path)
    assert f"going on: {len(kept)} of 24 items" in done.stdout
    assert lines()[: len(kept)] == kept
    found = [json.loads(line) for line in lines()]
    assert sorted(int(record["id"]) for record in found) == list(range(24))
    samples = photo_grid.make_samples(24, 7, "test")
    for record in found:
        assert record["ground_truth"] == [samples[int(record["id"])].answer]
        assert record["prompt_tokens"] > 16 and 0 < record["response_tokens"] <= 24  # 16 of them are the image's.
    assert json.loads((out / "results.json").read_text())["tasks"]["grid"]["n"] == 24
