# SPDX-License-Identifier: Apache-2.0
"""Kill a run of `avar synth` at a random moment, run it again, and find calls that were paid for twice in the servers'
logs.

    python -m examples.synth.kill_and_resume --work /tmp/vard --n 500

Two example servers, 10 % wrong answers, 5 % errors. Every process of the run is killed (SIGKILL) after a random number
of answers. Prints one JSON object; exit code 1 if a call was repeated whose answer was in the cache, a wrong answer
was accepted, or an input is missing. An answer that has left the server but is not in the cache at the kill is lost:
`left_ms` is the longest time before the kill at which such an answer had left.
"""

import argparse
import contextlib
import json
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from avar_verl.tools.synth.store import JOURNAL, read_journal
from examples.synth.inputs import write_inputs

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "recipes" / "avar" / "synth" / "photo_grid.yaml"


def free_port() -> int:
    """An unused port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def server(work: Path, name: str, *options: str):
    """Start an example server in its own process: (port, process)."""
    port = free_port()
    command = [sys.executable, "-m", "examples.synth.server", "--port", str(port), "--log", str(work / f"{name}.jsonl")]
    with (work / f"{name}.txt").open("a") as text:
        process = subprocess.Popen([*command, *options], stdout=text, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            deadline = time.monotonic() + 120
            while answered(port) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"server {name} must come up; got:\n{(work / f'{name}.txt').read_text()}")
                time.sleep(0.2)
            yield port, process
        finally:
            process.kill()
            process.wait()


def answered(port: int) -> int | None:
    """Number of answers that a server has given, None if it does not listen."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as reply:
            return json.load(reply)["answered"]
    except OSError:
        return None


def synth(work: Path, ports: dict[str, int], *overrides: str) -> list[str]:
    """Command of a run."""
    return [
        *(sys.executable, "-m", "avar_verl", "synth", "run", "--config", str(CONFIG)),
        f"out={work / 'out'}",
        f"input.files=[{work / 'inputs.parquet'}]",
        *(f"endpoints.{name}.url=http://127.0.0.1:{port}/v1" for name, port in ports.items()),
        *overrides,
    ]


def kill_tree(process: subprocess.Popen) -> tuple[float, float]:
    """SIGKILL a process and everything it started, including Ray's workers; returns when that began and when all were
    dead.
    """
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    now = time.time()
    for victim in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    psutil.wait_procs(family[1:], timeout=10)
    process.wait()
    return now, time.time()


def read_logs(work: Path) -> list[dict]:
    """Attempts of both servers."""
    return [json.loads(line) for path in sorted(work.glob("*.jsonl")) for line in path.read_text().splitlines()]


def cached(work: Path) -> int:
    """Answers in the cache and the journals of a killed run."""
    database = sqlite3.connect(work / "out" / "cache.sqlite")
    try:
        keys = {key for (key,) in database.execute("SELECT key FROM calls")}
        return len(keys | {call.key for call in read_journal(work / "out" / JOURNAL)})
    finally:
        database.close()


def repeated(log: list[dict], began: float, dead: float) -> dict[str, float]:
    """What became of the calls made before the kill: `kept`, answered and not made again; the others were made once
    more, without an answer when it began, or with one that had left the server at most `left_ms` before it."""
    by_key = defaultdict(list)
    for entry in log:
        by_key[entry["key"]].append(entry)
    out = {
        "kept": 0,
        "in_flight_at_kill": 0,
        "repeated_unanswered": 0,
        "repeated_answered": 0,
        "left_ms": 0.0,
    }
    for entries in by_key.values():
        before = [entry for entry in entries if entry["start"] < dead]
        after = [entry for entry in entries if entry["start"] >= dead]
        done = [entry for entry in before if entry["status"] == 200]
        open_ones = [entry for entry in before if entry["end"] >= began]
        out["kept"] += bool(done) and not after
        out["in_flight_at_kill"] += bool(open_ones)
        if after and open_ones:
            out["repeated_unanswered"] += 1
        elif after and done:
            out["repeated_answered"] += 1
            out["left_ms"] = max(out["left_ms"], 1000 * (began - max(entry["end"] for entry in done)))
    return out


def wrong_items(log: list[dict]) -> int:
    """Requests that got a wrong answer on purpose."""
    return len({entry["key"] for entry in log if entry["wrong"] and entry["status"] == 200})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder, to be made")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="of the moment of the kill (default: random)")
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    write_inputs(args.work / "inputs.parquet", args.n)
    options = ("--n", str(args.n), "--latency", str(args.latency))
    with server(args.work, "vision", *options) as (vision, _), server(args.work, "language", *options) as (language, _):
        ports = {"vision": vision, "language": language}
        command = synth(args.work, ports, *args.overrides)
        stop_at = random.Random(args.seed).randint(args.n // 4, int(2.5 * args.n))
        with (args.work / "run.log").open("w") as text:
            process = subprocess.Popen(command, stdout=text, stderr=subprocess.STDOUT, cwd=ROOT)
            while (answered(vision) or 0) + (answered(language) or 0) < stop_at:
                if process.poll() is not None:
                    raise RuntimeError(f"the run ended before it was killed\n{(args.work / 'run.log').read_text()}")
                time.sleep(0.02)
            began, dead = kill_tree(process)
            time.sleep(1.0)
            in_cache = cached(args.work)
            begin = time.monotonic()
            code = subprocess.run(command, stdout=text, stderr=subprocess.STDOUT, cwd=ROOT).returncode
        seconds = time.monotonic() - begin
    if code:
        raise RuntimeError(f"the second run must succeed\n{(args.work / 'run.log').read_text()}")
    log = read_logs(args.work)
    rows = pq.read_table(args.work / "out" / "records.parquet", columns=["gate", "failed"]).to_pylist()
    summary = json.loads((args.work / "out" / "summary.json").read_text())
    again = repeated(log, began, dead)
    out = {
        "inputs": len(rows),
        "accepted": sum(not row["gate"] for row in rows),
        "rejected": {gate: part["first"] for gate, part in summary["gates"].items() if part["first"]},
        "killed_after_answers": stop_at,
        "attempts": len(log),
        "attempts_by_status": {str(s): sum(e["status"] == s for e in log) for s in (200, 429, 500, 0)},
        "calls_answered": len({entry["key"] for entry in log if entry["status"] == 200}),
        "in_cache_after_kill": in_cache,
        **again,
        "wrong_answers_given": wrong_items(log),
        "rejected_as_wrong": sum("answer" in json.loads(row["failed"]) for row in rows),
        "second_run_seconds": round(seconds, 1),
    }
    print(json.dumps(out, indent=1))
    # The answers that had reached the cache are exactly those that were not asked for again.
    ok = (
        out["inputs"] == args.n and again["kept"] == in_cache and out["wrong_answers_given"] == out["rejected_as_wrong"]
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
