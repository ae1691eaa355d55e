# SPDX-License-Identifier: Apache-2.0
"""Rows of parquet, json lines and json, lazily, and what is refused."""

import json

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from avar_verl.data.rows import count_rows, data_files, read_rows

ROWS = [
    {"messages": [{"role": "user", "content": "a"}], "images": [{"bytes": b"\x00\xff", "path": None}], "n": 1},
    {"messages": [], "images": None, "n": 2},
]
TEXT = [{"messages": [{"role": "user", "content": "ä"}], "n": 1}, {"messages": None, "n": 2.5}]


def plain(value):
    if isinstance(value, dict):
        return all(plain(item) for item in value.values())
    if isinstance(value, list):
        return all(plain(item) for item in value)
    return type(value) in (str, bytes, int, float, bool, type(None))


@pytest.mark.parametrize("writer", ["pyarrow", "pandas"])
def test_parquet_rows_are_plain_python(tmp_path, writer):
    path = tmp_path / "rows.parquet"
    if writer == "pyarrow":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        pd.DataFrame(ROWS).to_parquet(path)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == ROWS and plain([row.values for row in rows])
    assert [(row.file, row.number) for row in rows] == [(path, 0), (path, 1)]


@pytest.mark.parametrize("name, text", [
    ("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in TEXT)),
    ("rows.jsonl", "".join(json.dumps(row) + "\n\n" for row in TEXT)),
    ("rows.json", "".join(json.dumps(row) + "\n" for row in TEXT)),
    ("rows.json", "\n " + json.dumps(TEXT, indent=2)),
])  # fmt: skip
def test_json_rows(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert [(row.number, row.values) for row in read_rows(str(path))] == list(enumerate(TEXT))


def test_files_and_folders_in_order(tmp_path):
    for name, start in (("b.jsonl", 0), ("a.jsonl", 2), ("sub/c.jsonl", 4)):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"n": {start}}}\n{{"n": {start + 1}}}\n')
    (tmp_path / "data" / "notes.md").write_text("no rows")
    rows = list(read_rows([tmp_path / "data", tmp_path / "data" / "b.jsonl"]))
    assert [row.values["n"] for row in rows] == [2, 3, 0, 1, 4, 5, 0, 1]
    assert [row.number for row in rows] == [0, 1] * 4
    pyarrow.parquet.write_table(pyarrow.table({"n": [7, 8, 9]}), tmp_path / "data" / "d.parquet")
    assert [file.name for file in data_files(tmp_path / "data")] == ["d.parquet"]  # Then the others are something else.
    assert count_rows([tmp_path / "data" / "d.parquet", tmp_path / "data" / "b.jsonl"]) == 5
    assert count_rows([tmp_path / "data" / "x.json"]) is None


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 0}\n{"n": 1}\nbroken\n')
    rows = read_rows(path)
    assert next(rows).values == {"n": 0} and next(rows).values == {"n": 1}
    with pytest.raises(ValueError, match="line 3 of .*rows.jsonl must be JSON in UTF-8"):
        next(rows)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.parquet", b"PAR1 is how it starts", "a.parquet must be a whole parquet file; got: "),
        ("a.parquet", b"", "a.parquet must be a whole parquet file"),
        ("a.jsonl", b"", "a data file must have rows; got none in .*a.jsonl"),
        ("a.jsonl", b"\n \n", "a data file must have rows"),
        ("a.jsonl", b'{"n": 1}\n[1]\n', "line 2 of .*a.jsonl must be a JSON object; got list"),
        ("a.jsonl", b'{"n": "\xff"}\n', "line 1 of .*a.jsonl must be JSON in UTF-8; got: 'utf-8' codec"),
        ("a.json", b"[]", "a data file must have rows"),
        ("a.json", b"[1, 2]", "row 0 of .*a.json must be a JSON object; got int"),
        ("a.json", b'[{"n": 1},', "a.json must be JSON in UTF-8; got: "),
        ("a.json", b'{\n"n": 1\n}', "line 1 of .*a.json must be JSON in UTF-8"),
        ("a.csv", b"n\n1\n", "data are read from .parquet, .jsonl, .json files; got .*a.csv"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(tmp_path / name))


def test_a_parquet_file_that_stops_half_way(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["abc" * 100] * 50}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[10:60] = b"\xff" * 50
    path.write_bytes(data)
    with pytest.raises(ValueError, match="rows.parquet must be a whole parquet file; got: "):
        list(read_rows(path))


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a data file must exist; got .*none.parquet"):
        data_files(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="a folder of data must hold .parquet, .jsonl, .json files; got none in "):
        data_files(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"n": pyarrow.array([], pyarrow.int64())}), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="a data file must have rows; got none in .*empty.parquet"):
        list(read_rows(tmp_path / "empty.parquet"))
