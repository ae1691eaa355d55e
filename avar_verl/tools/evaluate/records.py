# SPDX-License-Identifier: Apache-2.0
"""One line of JSON for each answer, and what a folder needs so that a killed run goes on without mixing two.

A task's folder holds `settings.json`, whatever would change an answer or its grade, and `records.jsonl`, one record an
item, written and flushed when the item is done. A line that a kill cut short is dropped, so its item is asked again.
"""

import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

SETTINGS, RECORDS = "settings.json", "records.jsonl"
# Small files decide by content; weights by size and time, since reading them takes as long as loading the model.
READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Record:
    """What became of one item."""

    id: str
    """Of the item."""

    task: str
    """Name of the task."""

    prompt_hash: str
    """`Item.prompt_hash`."""

    response: str
    """Text of the model, without the prompt."""

    answer: str | None
    """Found in the response; null without one."""

    ground_truth: list[str]
    """Accepted answers."""

    correct: bool
    """The grader's word."""

    prompt_tokens: int
    """As the server counts them, image tokens included."""

    response_tokens: int
    """As the server counts them."""

    finish_reason: str
    """Of the server: "stop", or "length" for a response that was cut off."""

    seconds: float
    """From the request to the response, waiting in the server's queue and retries included."""

    data_source: str = ""
    """As in verl's data."""

    groups: dict[str, str] = field(default_factory=dict)
    """As in `Item`."""


def model_fingerprint(path: Path) -> str:
    """SHA-256 over the files of a Hugging Face folder: small ones (configs, tokenizer, weight index) by content, the
    others by size and time of change.

    Raises:
        ValueError: no config.json in it.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"--model must be a Hugging Face folder; got no config.json in {path}. Check the path.")
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")):
        state = file.stat()
        small = state.st_size <= READ_BYTES and file.suffix in (".json", ".jinja", ".txt", ".model")
        what = hashlib.sha256(file.read_bytes()).hexdigest() if small else f"{state.st_size} {state.st_mtime_ns}"
        digest.update(f"{file.name} {what}\n".encode())
    return digest.hexdigest()


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{where}.{key}".strip("."))]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def read_records(folder: Path) -> tuple[dict[str, Record], int]:
    """The records of a task's folder by item id, and how many bytes of the file are whole lines.

    Raises:
        ValueError: a whole line that is no record, or two records of one item.
    """
    path = folder / RECORDS
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    records: dict[str, Record] = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        where, fix = f"line {number} of {path}", "Delete the line: its item is asked again."
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"every line must be a record; got {line[:80]!r} in {where}: {error}. {fix}") from error
        if record.id in records:
            raise ValueError(f"an item must have one record; got a second one of {record.id!r} in {where}. {fix}")
        records[record.id] = record
    return records, whole


class RecordFile:
    """The records of one task, open for writing; no second run can open them meanwhile.

    Raises:
        ValueError: the folder was made with other settings, or is in use.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = (folder / RECORDS).open("ab")
        try:
            self._lock()
            self._check_settings(json.loads(json.dumps(settings)))
            self.records, whole = read_records(folder)
            self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"a folder holds one run at a time; got one that is still writing to {self.folder}. Wait for it, or "
                "choose another folder with --out."
            ) from error

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        if path.exists():
            changed = _differences(json.loads(path.read_text()), settings)
            if changed:
                raise ValueError(
                    f"a folder holds answers of one setting; got others than those of {self.folder}: "
                    f"{'; '.join(changed)}. Choose another folder with --out, or delete this one."
                )
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(settings, indent=1))
        os.replace(temporary, path)

    def add(self, record: Record) -> None:
        """Append a record; it is with the operating system when this returns, so a killed process does not lose it."""
        if record.id in self.records:
            raise AssertionError(f"item {record.id} was asked twice")
        self._file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.records[record.id] = record

    def close(self) -> None:
        """Close the file and let others open it."""
        self._file.close()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
