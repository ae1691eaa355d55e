# SPDX-License-Identifier: Apache-2.0
"""Records survive a kill, and no two runs mix."""

import json
import math

import numpy as np
import pytest

from avar_verl.tools.vas.records import RecordFile, check_settings, dumps, plain, write_json


def rows(*numbers: int) -> list[dict]:
    return [{"row": number, "value": number / 3} for number in numbers]


def test_records_come_back_in_the_order_of_rows(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordFile(path) as store:
        store.append(rows(2, 0))
        store.append(rows(1))
    with RecordFile(path) as store:
        assert [record["row"] for record in store.records()] == [0, 1, 2] and len(store) == 3
        assert [record["row"] for record in store.records(2)] == [0, 1]
        assert 1 in store and 3 not in store
        store.append(rows(3))
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [2, 0, 1, 3]


def test_records_are_on_disk_when_append_returns(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordFile(path) as store:
        store.append(rows(0))
        assert path.read_text() == '{"row": 0, "value": 0.0}\n'


def test_a_line_that_a_kill_has_cut_short_is_measured_again(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"row": 0, "value": 1}\n{"row": 1, "val')
    with RecordFile(path) as store:
        assert 0 in store and 1 not in store
        store.append(rows(1))
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1]


def test_one_run_writes_at_a_time(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordFile(path), pytest.raises(ValueError, match="one run writes into a folder"):
        RecordFile(path)
    with RecordFile(path):  # Closed, it is free.
        pass


@pytest.mark.parametrize("line", ["[]", "{", '{"sample": "a"}', "3"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text('{"row": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2 of .*records.jsonl must be a record"):
        RecordFile(path)
    with pytest.raises(ValueError, match="line 2"):  # And the lock is gone.
        RecordFile(path)


def test_two_records_of_one_row_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"row": 0}\n{"row": 0}\n')
    with pytest.raises(ValueError, match="got row 0 again in line 2"):
        RecordFile(path)
    with RecordFile(None) as store, pytest.raises(ValueError, match="got row 5 again"):
        store.append(rows(5, 5))


def test_in_memory_records_are_those_that_a_file_would_give(tmp_path):
    with RecordFile(None) as memory, RecordFile(tmp_path / "r.jsonl") as file:
        for store in (memory, file):
            store.append([{"row": 0, "value": 1 / 3, "user": {"ratio": [[math.inf, 1.0], (1 / 3, math.nan)]}}])
    with RecordFile(tmp_path / "r.jsonl") as again:
        for [record] in (memory.records(), file.records(), again.records()):
            assert record["value"] == 0.333333333 and record["user"]["ratio"].dtype == np.float64
            np.testing.assert_equal(record["user"]["ratio"], [[math.inf, 1.0], [0.333333333, math.nan]])


def test_json_is_strict():
    values = [math.inf, -math.inf, math.nan, 1e-300, 0.1 + 0.2, True, None, "inf", 3]
    assert plain(values) == ["inf", "-inf", "nan", 1e-300, 0.3, True, None, "inf", 3]
    assert json.loads(dumps({"a": values}), parse_constant=pytest.fail)["a"][:3] == ["inf", "-inf", "nan"]
    assert [float(text) for text in plain(values)[:2]] == values[:2] and math.isnan(float("nan"))


def test_a_folder_holds_one_measurement(tmp_path):
    path = tmp_path / "settings.json"
    check_settings(path, {"model": "a", "layers": (1, 2)})
    check_settings(path, {"model": "a", "layers": [1, 2]})
    with pytest.raises(ValueError, match="other settings; got model: 'a' there, 'b' now"):
        check_settings(path, {"model": "b", "layers": [1, 2]})
    with pytest.raises(ValueError, match="dtype: None there, 'x' now, layers: "):
        check_settings(path, {"dtype": "x", "model": "a"})


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "vas.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
