# SPDX-License-Identifier: Apache-2.0
"""Records on disk: one JSON line a sample, appended as it is measured, so that a killed run goes on where it stopped.

JSON has no inf and nan: they are the strings "inf", "-inf" and "nan", which `float` and numpy read.
"""

import fcntl
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# Digits that are kept: more than a float32 mass has.
DIGITS = 9


def plain(value: Any) -> Any:
    """`value` for strict JSON: floats with DIGITS digits, those that are not finite as text."""
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
    """Write a file as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """A folder holds one measurement: going on in it with other settings would mix two.

    Raises:
        ValueError: `path` holds other settings.
    """
    wanted = json.loads(dumps(settings))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in {*wanted, *found} if found.get(key) != wanted.get(key))
        if changed:
            differences = ", ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in changed)
            raise ValueError(
                f"{path.parent} holds a measurement with other settings; got {differences}. Choose another folder with "
                "--out, or delete this one."
            )
        return
    write_json(path, settings)


def _compact(value: Any) -> Any:
    """Nested lists of numbers as float64 arrays, a quarter of their memory; the rest as it is."""
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    is_matrix = isinstance(value, list) and value and isinstance(value[0], list)
    return np.array(value, dtype=np.float64) if is_matrix else value  # numpy reads "inf" and "nan".


class RecordFile:
    """The records of a measurement, `path` None: in memory alone. In memory, matrices are arrays.

    An open file is locked, so that two runs do not write into one. A last line that a kill has cut short is dropped.

    Raises:
        ValueError: the file is in use, a line that is no record, or two of one row.
    """

    def __init__(self, path: Path | None):
        self._by_row: dict[int, dict[str, Any]] = {}
        self._file = None
        if path is None:
            return
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(
                f"one run writes into a folder; got {path}, which another one has open. Wait for it, or choose another "
                "folder with --out."
            ) from error
        try:
            self._read(path)
        except ValueError:
            self._file.close()
            raise

    def _read(self, path: Path) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(whole)
                break
            whole += len(line)
            try:
                record = json.loads(line)
                row = record["row"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} must be a record of avar vas; got {line[:60]!r}. Delete the line: its "
                    "sample is measured again."
                ) from error
            if row in self._by_row:
                raise ValueError(f"a row has one record; got row {row} again in line {number} of {path}. Delete one.")
            self._by_row[row] = _compact(record)
        self._file.seek(0, 2)

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *_exception) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, row: int) -> bool:
        return row in self._by_row

    def __len__(self) -> int:
        return len(self._by_row)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Add records of new rows; they are on disk when this returns."""
        for record in records:
            line = dumps(record)
            if record["row"] in self._by_row:
                raise ValueError(f"a row has one record; got row {record['row']} again. Measure every row once.")
            self._by_row[record["row"]] = _compact(json.loads(line))
            if self._file is not None:
                self._file.write(line.encode() + b"\n")
        if self._file is not None:
            self._file.flush()

    def records(self, n: int = 0) -> list[dict[str, Any]]:
        """Records in the order of rows; `n`: of the first n rows alone."""
        return [self._by_row[row] for row in sorted(self._by_row) if not n or row < n]
