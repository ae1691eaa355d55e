# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI-compatible server as a subprocess during a `with` block."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from avar_verl.tools.progress import progress

NAME = "avar-eval"
"""The model's name in requests to a server started here."""

LOG_LINES = 40
STOP_SECONDS = 20.0
# Without the proxies of the environment, which are not for this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Server:
    """A running server at `url` (with /v1)."""

    process: subprocess.Popen
    url: str
    log: Path

    def check(self) -> None:
        """Raise if the server has ended.

        Raises:
            RuntimeError: it has ended; the message shows the end of its log.
        """
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise RuntimeError(f"vLLM ended with exit code {self.process.returncode}; log: {self.log}\n{tail}")


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def server_command(
    model: Path, port: int, *, num_images: int, cpu: bool, max_model_len: int | None, extra: Sequence[str] = ()
) -> list[str]:
    """The command line; `extra` comes last, so that it takes precedence.

    Args:
        num_images: largest number of images of a prompt.
        cpu: no accelerator: float32, no compilation, no profiling with the largest image (minutes there).
        max_model_len: tokens of prompt and response together; None uses the model's config.
    """
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--limit-mm-per-prompt", json.dumps({"image": num_images, "video": 0})),
        *("--generation-config", "vllm", "--seed", "0"),  # Only the request defines the sampling.
        *(("--dtype", "float32", "--enforce-eager", "--skip-mm-profiling") if cpu else ()),
        *(("--max-model-len", str(max_model_len)) if max_model_len else ()),
        *extra,
    ]


def _die_with_parent() -> None:
    """In the child: end when the process that started it ends, for any reason (Linux only)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _healthy(port: int) -> bool:
    try:
        with _OPENER.open(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen) -> None:
    """End the process group: the API server and its engines."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass  # Below.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running_server(
    command: Sequence[str], port: int, log: Path, *, timeout_s: float, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start `command`, wait until /health answers, and end it with its children when the block ends, also on Ctrl-C.

    Raises:
        RuntimeError: it ended, or did not answer within `timeout_s`; the message shows the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Its own process group: Ctrl-C reaches it only through `_stop`.
            preexec_fn=_die_with_parent,
        )
        server = Server(process, f"http://127.0.0.1:{port}/v1", log)
        try:
            begin = time.monotonic()
            with progress(desc="vLLM starts", bar_format="{desc}: {elapsed}") as bar:
                while not _healthy(port):
                    server.check()
                    if time.monotonic() - begin > timeout_s:
                        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
                        raise RuntimeError(
                            f"vLLM must answer within {timeout_s:.0f} s (--server-timeout); it did not. "
                            f"Log: {log}\n{tail}"
                        )
                    time.sleep(0.5)
                    bar.update()
            yield server
        finally:
            _stop(process)


def cpu_environment() -> dict[str, str]:
    """Unless the environment says otherwise: little memory for keys and values, no pinned cores, and the worker in the
    engine's process, which saves starting another one.
    """
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    return {key: value for key, value in defaults.items() if key not in os.environ}
