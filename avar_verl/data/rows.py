# SPDX-License-Identifier: Apache-2.0
"""Rows of data files, one at a time: parquet, json lines and json, or folders of them. No verl, no torch."""

import codecs
import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

# In search order: a folder counts as one of the first kind found in it.
SUFFIXES = (".parquet", ".jsonl", ".json")
# Rows decoded at a time; images of a few megabytes each must fit into memory.
BATCH_ROWS = 8

Item = TypeVar("Item")
Paths = str | os.PathLike | Sequence[str | os.PathLike]


class Row(NamedTuple):
    """One row. `number` counts from 0 in `file` (or a data set of the hub), `index` over all that is read; `values` are
    plain Python: dict, list, str, bytes, numbers, None."""

    file: Path | str
    number: int
    values: dict[str, Any]
    index: int

    @property
    def where(self) -> str:
        """The row in messages."""
        return f"row {self.number} of {self.file}"


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Put the place in front of what is refused in the block.

    >>> with naming("row 3 of a.parquet"):
    ...     raise ValueError("images must be here; got none.")
    Traceback (most recent call last):
    ValueError: row 3 of a.parquet: images must be here; got none.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def data_files(paths: Paths) -> list[Path]:
    """The files of one or several paths; a folder means its files of one kind, in alphabetical order.

    Raises:
        ValueError: a missing file, a folder without data files, or a file of another kind.
    """
    out = []
    for path in [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]:
        if path.is_dir():
            by_kind = (sorted(file for file in path.rglob(f"*{suffix}") if file.is_file()) for suffix in SUFFIXES)
            files = next((found for found in by_kind if found), [])
            if not files:
                raise ValueError(
                    f"a folder of data must hold {', '.join(SUFFIXES)} files; got none in {path}. Name one."
                )
            out += files
        elif path.suffix not in SUFFIXES:
            raise ValueError(f"data are read from {', '.join(SUFFIXES)} files; got {path}. Convert the file.")
        elif not path.is_file():
            raise ValueError(f"a data file must exist; got {path}. Check the path.")
        else:
            out.append(path)
    return out


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    # UnicodeDecodeError: pyarrow does not validate text when it reads.
    errors = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    try:
        # Without a buffer, or with read-ahead, whole row groups of images would be in memory.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()
    except errors as error:
        raise ValueError(f"{path} must be a whole parquet file; got: {error}. Write or download it again.") from error


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode())  # Of bytes, json would guess UTF-16, or skip a byte order mark in any line.
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where} must be JSON in UTF-8; got: {error}. Correct the file.") from error


def _as_row(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object; got {type(value).__name__}. Write one object a row.")
    return value


def _json(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of json lines, or of one array (which is read whole). A byte order mark may open the file."""
    with path.open("rb") as file:
        begin = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(begin)
        start = file.read(1024).lstrip()
        file.seek(begin)
        if path.suffix == ".json" and start.startswith(b"["):
            for number, value in enumerate(_parsed(file.read(), str(path))):
                yield _as_row(value, f"row {number} of {path}")
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"line {number} of {path}"
                yield _as_row(_parsed(line, where), where)


def read_rows(paths: Paths) -> Iterator[Row]:
    """The rows of one or several files or folders, in order, read lazily.

    Raises:
        ValueError: anything that `data_files` refuses, a file without rows, or a file whose content does not match its
            name; the message names the file, and the line of a json file.
    """
    index = itertools.count()
    for file in data_files(paths):
        number = -1
        for number, values in enumerate(_parquet(file) if file.suffix == ".parquet" else _json(file)):
            yield Row(file, number, values, next(index))
        if number < 0:
            raise ValueError(f"a data file must have rows; got none in {file}. Leave it out or write it again.")


def count_rows(files: Sequence[Path]) -> int | None:
    """Number of rows of the files, for a progress bar; None if they would have to be read completely."""
    import pyarrow.parquet

    total = 0
    for file in files:
        if file.suffix == ".json":
            return None
        try:
            if file.suffix == ".parquet":
                total += pyarrow.parquet.read_metadata(file).num_rows
            else:
                with file.open("rb") as lines:
                    total += sum(1 for line in lines if line.strip())
        except (pyarrow.ArrowException, OSError):  # Reading the file later reports what is wrong.
            return None
    return total


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter.

    >>> list(batched("abc", 2))
    [['a', 'b'], ['c']]
    """
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
