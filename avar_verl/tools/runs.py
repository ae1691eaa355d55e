# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its settings, which must not change, and its records, which survive a kill.

`settings.json` holds everything that could change a result. `records.jsonl` holds one JSON line for each finished
sample, appended as soon as it is done, so a killed run continues where it stopped.

JSON has no inf and nan: they are the strings "inf", "-inf" and "nan", which `float` and numpy read.
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SETTINGS, RECORDS = "settings.json", "records.jsonl"
# Digits to keep: more than a float32 mass has.
DIGITS = 9


# ---- JSON --------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """`value` for strict JSON: floats with DIGITS digits, non-finite ones as text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON of `plain(value)`."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


# ---- settings ----------------------------------------------------------------------------------------------------


def absolute(name: str) -> str:
    """The absolute path of a local file or folder; a name on the hub unchanged."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def fingerprint(path: Path) -> str | None:
    """Sixteen hex digits of the names, sizes and times of the files in a folder, or of one file; None if the path does
    not exist. It changes if training overwrites a checkpoint.
    """
    if not path.exists():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _changes(found: Any, wanted: Any, where: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [line for key in keys for line in _changes(found.get(key), wanted.get(key), f"{where}.{key}".strip("."))]
    return [] if found == wanted else [f"{where}: {found!r} there, {wanted!r} now"]


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a run to `path`, or compare them with existing ones: a folder holds the results of one run.

    Raises:
        ValueError: `path` holds other settings.
    """
    wanted = json.loads(dumps(settings))
    if not path.exists():
        write_json(path, settings)
        return
    found = plain(json.loads(path.read_text(encoding="utf-8")))
    if found != wanted:
        version = "" if found.keys() == wanted.keys() else " (another version of avar wrote it)"
        raise ValueError(
            f"{path.parent} holds a run with other settings{version}; got {', '.join(_changes(found, wanted))}. "
            "Choose another folder with --out, or delete this one."
        )


# ---- records -----------------------------------------------------------------------------------------------------


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without an incomplete last line after a kill."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def read_records(path: Path, key: str, load: Callable[[dict], Any] = lambda record: record) -> dict[Any, Any]:
    """The records of a file by their field `key`, converted by `load`; empty if there is no file.

    Raises:
        ValueError: a line that is not a record, or two records with the same `key`.
    """
    records: dict[Any, Any] = {}
    for number, line in enumerate(whole_lines(path) if path.exists() else (), start=1):
        fix = "Delete the line: the command makes it again."
        try:
            fields = json.loads(line)
            name, record = fields[key], load(fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {path} must be a record; got {line[:60]!r}: {error}. {fix}") from error
        if name in records:
            raise ValueError(f"records must differ in {key}; got {name!r} again in line {number} of {path}. {fix}")
        records[name] = record
    return records


class RecordFile:
    """The records of a run by their field `key`, converted by `load`; with `path` None, only in memory.

    An open file is locked, so two runs cannot write into it, and `settings` are stored in the same folder
    (`check_settings`). An incomplete last line after a kill is dropped.

    Attributes:
        records: by `key`, in the order of the file.

    Raises:
        ValueError: the file is in use, belongs to a run with other settings, or has a line that is not a record.
    """

    def __init__(
        self,
        path: Path | None,
        key: str,
        settings: dict[str, Any] | None = None,
        load: Callable[[dict], Any] = lambda record: record,
    ):
        self.path, self.records = path, {}
        self._key, self._load, self._file = key, load, None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if settings is not None:
                check_settings(path.with_name(SETTINGS), settings)
            self.records = read_records(path, key, load)
            self._file.truncate(sum(map(len, whole_lines(path))))
        except BlockingIOError as error:
            self.close()
            raise ValueError(
                f"one run at a time writes into a folder; got {path}, which another one has open. Wait for it, or "
                "choose another folder with --out."
            ) from error
        except ValueError:
            self.close()
            raise

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records. They are with the operating system when this returns, so a killed process does not lose them."""
        for record in records:
            name, line = record[self._key], dumps(record)
            if name in self.records:
                raise ValueError(f"records must differ in {self._key}; got {name!r} again. Make each one once.")
            self.records[name] = self._load(json.loads(line))
            if self._file is not None:
                self._file.write(line.encode() + b"\n")
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file and release its lock."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
