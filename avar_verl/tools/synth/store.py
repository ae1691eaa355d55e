# SPDX-License-Identifier: Apache-2.0
"""The cache of answers, on disk before they are used. SQLite, one writer, no Ray.

A row of `calls` is an answer under the hash of everything it depends on. `failures` has the reasons of calls that
failed in the latest run. Failures that would happen again (`final`) are kept and not repeated; the next run retries the
others.

The whole database is locked while it is open, so two runs of one folder cannot overlap, and a killed run leaves no
lock. WAL with `synchronous=FULL` syncs the file at every commit; `put` commits immediately.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avar_verl.tools.runs import whole_lines

JOURNAL = "journal"
"""Folder of the journals, in the folder of the database."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
  key TEXT PRIMARY KEY, item TEXT, stage TEXT, model TEXT, prompt TEXT, text TEXT, finish TEXT,
  input_tokens INTEGER, output_tokens INTEGER, usd REAL, attempts INTEGER, seconds REAL, created REAL);
CREATE INDEX IF NOT EXISTS calls_stage ON calls (stage, model);
CREATE TABLE IF NOT EXISTS failures (
  key TEXT PRIMARY KEY, item TEXT, stage TEXT, reason TEXT, attempts INTEGER, final INTEGER);
"""


@dataclass(frozen=True)
class Call:
    """An answer. `finish` is the server's finish_reason; tokens as reported; `usd` its cost."""

    key: str
    item: str
    stage: str
    model: str
    prompt: str
    text: str
    finish: str
    input_tokens: int
    output_tokens: int
    usd: float
    attempts: int
    seconds: float
    created: float


@dataclass(frozen=True)
class Failure:
    """A call without an answer. `final`: the same request would fail again."""

    key: str
    item: str
    stage: str
    reason: str
    attempts: int
    final: bool


def call_key(
    model: str, prompt: str, messages: Sequence[dict[str, str]], pictures: Sequence[str], sampling: dict
) -> str:
    """Hash of everything an answer depends on: model, prompt version, the messages (which contain the input and the
    output of earlier stages), hashes of the images sent, sampling parameters.
    """
    content = [model, prompt, messages, list(pictures), sampling]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Journal:
    """Answers of one process as they arrive, one line each, passed to the operating system at once, without waiting for
    the disk.

    A commit of the cache takes a few milliseconds, in which the process may be killed; a written line survives that.
    `Store.begin` adds the lines to the cache.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / f"{os.uname().nodename}-{os.getpid()}.jsonl", "ab", buffering=0)

    def add(self, call: Call) -> None:
        """Write an answer."""
        self.file.write(json.dumps(asdict(call)).encode() + b"\n")


def read_journal(folder: Path) -> list[Call]:
    """The answers in the journals of a folder, without lines that a kill cut off."""
    return [Call(**json.loads(line)) for path in sorted(folder.glob("*.jsonl")) for line in whole_lines(path)]


class Store:
    """The open database of a folder.

    Raises:
        ValueError: another run has it open.
    """

    def __init__(self, path: str | Path, budget_usd: float | None = None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path, self.budget, self.reserved = str(path), budget_usd, 0.0
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
        try:
            self.db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute("PRAGMA synchronous=FULL")
            self.db.executescript(SCHEMA)
            self.db.execute("BEGIN IMMEDIATE")  # takes the lock
            self.db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self.db.close()
            raise ValueError(
                f"one run at a time may use a folder; got {path}: {error}. Wait for the other run, or stop it."
            ) from error
        self.spent = self._sum()
        self.new_calls = self.hits = 0

    def _sum(self) -> float:
        return self.db.execute("SELECT COALESCE(SUM(usd), 0) FROM calls").fetchone()[0]

    def adopt(self) -> None:
        """Add the answers that killed processes left in their journals, and delete the journals."""
        folder = Path(self.path).parent / JOURNAL
        calls = read_journal(folder)
        known = self.get([call.key for call in calls])
        self.put([call for call in calls if not isinstance(known.get(call.key), Call)])
        for path in folder.glob("*.jsonl"):
            path.unlink()
        self.spent, self.new_calls, self.hits = self._sum(), 0, 0

    def begin(self) -> None:
        """Start a run: add the journals, and forget failures that may have been by chance."""
        self.adopt()
        self.db.execute("DELETE FROM failures WHERE final = 0")

    def get(self, keys: Sequence[str]) -> dict[str, Call | Failure]:
        """Answers and failures (of this run, or final ones) by key."""
        out: dict[str, Call | Failure] = {}
        for start in range(0, len(keys), 500):
            chunk = list(keys[start : start + 500])
            marks = ",".join("?" * len(chunk))
            for row in self.db.execute(f"SELECT * FROM failures WHERE key IN ({marks})", chunk):
                out[row[0]] = Failure(*row[:5], bool(row[5]))
            for row in self.db.execute(f"SELECT * FROM calls WHERE key IN ({marks})", chunk):
                out[row[0]] = Call(*row)
        self.hits += sum(isinstance(value, Call) for value in out.values())
        return out

    def put(self, records: Sequence[Call | Failure], released: float = 0.0) -> None:
        """Write answers and failures; they are on disk when this returns. `released` are dollars that had been reserved
        for them.
        """
        self.db.execute("BEGIN IMMEDIATE")
        for record in records:
            values = list(asdict(record).values())
            table = "calls" if isinstance(record, Call) else "failures"
            self.db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({','.join('?' * len(values))})", values)
        self.db.execute("COMMIT")
        calls = [record for record in records if isinstance(record, Call)]
        self.new_calls += len(calls)
        self.spent += sum(call.usd for call in calls)
        self.reserved = max(0.0, self.reserved - released)

    def reserve(self, usd: float) -> str:
        """Reserve the dollars of a call: "yes", "no", or "wait" while calls in flight may leave enough."""
        if self.budget is None or self.spent + self.reserved + usd <= self.budget:
            self.reserved += usd
            return "yes"
        return "wait" if self.reserved > 1e-12 and self.spent + usd <= self.budget else "no"

    def totals(self) -> dict[str, Any]:
        """Counters of this run and dollars of all runs."""
        failures = self.db.execute("SELECT COUNT(*) FROM failures").fetchone()[0]
        return {"new_calls": self.new_calls, "hits": self.hits, "failures": failures, "usd": self.spent}

    def means(self) -> dict[tuple[str, str], tuple[int, float, float]]:
        """(number of calls, mean prompt tokens, mean generated tokens) by stage and model."""
        query = "SELECT stage, model, COUNT(*), AVG(input_tokens), AVG(output_tokens) FROM calls GROUP BY stage, model"
        return {(stage, model): (n, a, b) for stage, model, n, a, b in self.db.execute(query)}

    def by_stage(self) -> list[tuple[str, str, str, int, int, int, float, int]]:
        """(stage, model, prompt, calls, prompt tokens, generated tokens, dollars, attempts) of all runs."""
        query = (
            "SELECT stage, model, prompt, COUNT(*), SUM(input_tokens), SUM(output_tokens), SUM(usd), SUM(attempts) "
            "FROM calls GROUP BY stage, model, prompt ORDER BY MIN(created)"
        )
        return list(self.db.execute(query))

    def close(self) -> None:
        """Close the database and release its lock."""
        self.db.close()
