# SPDX-License-Identifier: Apache-2.0
"""Records survive a kill, and no two runs mix."""

import json
import math

import pytest

from avar_verl.tools.runs import SETTINGS, RecordFile, check_settings, dumps, fingerprint, plain, write_json


def rows(*numbers: int) -> list[dict]:
    return [{"row": number, "value": number / 3} for number in numbers]


def test_records_come_back_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    with RecordFile(path, "row") as store:
        store.append(rows(2, 0))
        store.append(rows(1))
        assert list(store.records) == [2, 0, 1]
    with RecordFile(path, "row", load=lambda record: record["value"]) as store:
        assert list(store.records) == [2, 0, 1] and store.records[1] == pytest.approx(1 / 3)
        store.append(rows(3))
        assert store.records[3] == 1.0
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [2, 0, 1, 3]


def test_records_are_on_disk_when_append_returns(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordFile(path, "row") as store:
        store.append(rows(0))
        assert path.read_text() == '{"row": 0, "value": 0.0}\n'


def test_a_line_that_a_kill_has_cut_short_is_measured_again(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"row": 0, "value": 1}\n{"row": 1, "val')
    with RecordFile(path, "row") as store:
        assert set(store.records) == {0}
        store.append(rows(1))
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1]


def test_one_run_writes_at_a_time(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordFile(path, "row"), pytest.raises(ValueError, match="one run at a time writes into a folder"):
        RecordFile(path, "row")
    with RecordFile(path, "row"):  # Closed, it is free.
        pass


@pytest.mark.parametrize("line", ["[]", "{", '{"sample": "a"}', "3"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_text('{"row": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2 of .*records.jsonl must be a record"):
        RecordFile(path, "row")
    with pytest.raises(ValueError, match="line 2"):  # And the lock is gone.
        RecordFile(path, "row")


def test_two_records_of_one_row_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"row": 0}\n{"row": 0}\n')
    with pytest.raises(ValueError, match="must differ in row; got 0 again in line 2"):
        RecordFile(path, "row")
    with RecordFile(None, "row") as store, pytest.raises(ValueError, match="got 5 again"):
        store.append(rows(5, 5))


def test_in_memory_records_are_those_that_a_file_would_give(tmp_path):
    path = tmp_path / "r.jsonl"
    with RecordFile(None, "row") as memory, RecordFile(path, "row") as file:
        for store in (memory, file):
            store.append([{"row": 0, "value": 1 / 3, "user": {"ratio": [[math.inf, 1.0], (1 / 3, math.nan)]}}])
    with RecordFile(path, "row") as again:
        for store in (memory, file, again):
            ratio = [["inf", 1.0], [0.333333333, "nan"]]
            assert store.records == {0: {"row": 0, "value": 0.333333333, "user": {"ratio": ratio}}}


def test_json_is_strict():
    values = [math.inf, -math.inf, math.nan, 1e-300, 0.1 + 0.2, True, None, "inf", 3]
    assert plain(values) == ["inf", "-inf", "nan", 1e-300, 0.3, True, None, "inf", 3]
    assert json.loads(dumps({"a": values}), parse_constant=pytest.fail)["a"][:3] == ["inf", "-inf", "nan"]
    assert [float(text) for text in plain(values)[:2]] == values[:2] and math.isnan(float("nan"))


def test_a_folder_holds_one_run(tmp_path):
    path = tmp_path / "settings.json"
    check_settings(path, {"model": "a", "layers": (1, 2)})
    check_settings(path, {"model": "a", "layers": [1, 2]})
    with pytest.raises(ValueError, match="other settings; got model: 'a' there, 'b' now"):
        check_settings(path, {"model": "b", "layers": [1, 2]})
    with pytest.raises(ValueError, match="another version of avar.*dtype: None there, 'x' now, layers: "):
        check_settings(path, {"dtype": "x", "model": "a"})


def test_settings_may_be_nested_and_floats_are_compared_as_they_are_written(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"sampling": {"top_p": 0.1 + 0.2, "seed": 0}}))
    check_settings(path, {"sampling": {"top_p": 0.3, "seed": 0}})
    with pytest.raises(ValueError, match=r"got sampling\.seed: 0 there, 1 now\. Choose"):
        check_settings(path, {"sampling": {"top_p": 0.3, "seed": 1}})


def test_records_are_of_one_setting(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordFile(path, "row", {"a": 1}):
        assert json.loads((tmp_path / SETTINGS).read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="other settings; got a: 1 there, 2 now"):
        RecordFile(path, "row", {"a": 2})
    RecordFile(path, "row", {"a": 1}).close()  # And the lock is gone.


def test_a_checkpoint_that_was_overwritten_has_another_fingerprint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("a")
    first = fingerprint(folder)
    assert first == fingerprint(folder) and fingerprint(tmp_path / "none") is None
    (folder / "weights").write_text("b")
    assert fingerprint(folder) != first
    assert fingerprint(folder / "weights") not in (first, None)


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "vas.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
