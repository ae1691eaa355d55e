# SPDX-License-Identifier: Apache-2.0
"""Summaries, the comparison of folders and the ablation table."""

import json
import math

import pytest
from rich.console import Console

from avar_verl.tools import cli
from avar_verl.tools.evaluate.benchmarks import NAMES
from avar_verl.tools.evaluate.command import Compare
from avar_verl.tools.evaluate.run import read_run, summarize
from avar_verl.tools.evaluate.tables import (
    PAPER_BENCHMARKS,
    PAPER_MEAN,
    ablation_rows,
    ablation_table,
    benchmark_scores,
    read_vas,
)
from avar_verl.tools.records import Record, Records


def record(i: int, right: bool, task: str = "x", **changes) -> Record:
    fields = {
        "id": str(i),
        "task": task,
        "prompt_hash": f"h{i}",
        "response": "",
        "answer": "a",
        "ground_truth": ["a"],
        "correct": right,
        "prompt_tokens": 3,
        "response_tokens": 10 * i,
        "finish_reason": "stop",
        "seconds": 0.1,
    }
    return Record(**{**fields, **changes})


def write(folder, bits: str, task: str = "x"):
    with Records(folder / task, {}) as file:
        for i, bit in enumerate(bits):
            file.add(record(i, bit == "1", task))
    return folder


def run_cli(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr("sys.argv", ["avar", "eval", *map(str, arguments)])
    cli.main()
    return capsys.readouterr().out


def test_summary():
    groups = [{"fAcc": "a"}, {"fAcc": "a"}, {"fAcc": "b"}, {"fAcc": "b"}]
    bits = (True, True, True, False)
    records = [record(i, right, groups=groups[i]) for i, right in enumerate(bits)]
    records[3] = record(3, False, groups=groups[3], answer=None, finish_reason="length")
    summary = summarize(records)
    assert summary["accuracy"] == 0.75 and summary["groups"] == {"fAcc": 0.5}
    assert summary["score"] == pytest.approx((0.75 + 0.5) / 2)
    assert summary["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert (summary["n"], summary["correct"], summary["no_answer"], summary["cut_off"]) == (4, 3, 1, 1)
    assert summary["response_tokens"] == 15
    with pytest.raises(ValueError, match="a summary needs records"):
        summarize([])


def test_the_papers_numbers_agree_with_their_means():
    for stage, mean in (("base", PAPER_MEAN[0]), ("+VARS", PAPER_MEAN[3])):
        assert sum(PAPER_BENCHMARKS[stage].values()) / len(NAMES) == pytest.approx(mean, abs=0.06)


def test_parts_of_a_benchmark_are_averaged():
    scores = {"mmmu_pro_standard": 0.5, "mmmu_pro_vision": 0.25, "grid": 1.0, "mathvista": 0.0}
    assert list(benchmark_scores(scores).items()) == [("mathvista", 0.0), ("mmmu_pro", 0.375), ("grid", 1.0)]
    with pytest.raises(ValueError, match="mmmu_pro is the mean of"):
        benchmark_scores({"mmmu_pro_vision": 0.5})


def test_compare_command(tmp_path, monkeypatch, capsys):
    a, b, c = (write(tmp_path / name, bits) for name, bits in (("a", "1100"), ("b", "0111"), ("c", "1100")))
    text = run_cli(monkeypatch, capsys, "compare", a, b, c, "--json", tmp_path / "out.json")
    assert "50.0" in text and "75.0" in text and "+25.0" in text
    out = json.loads((tmp_path / "out.json").read_text())
    row = out["runs"][str(b)]["x"]
    assert (row["n"], row["only_a"], row["only_b"]) == (4, 1, 2)
    assert row["p_value"] == pytest.approx(1.0)  # 2 (C(3,0) + C(3,1)) / 8
    assert out["runs"][str(c)]["x"]["difference"] == 0


def test_compare_refuses_what_cannot_be_compared(tmp_path, monkeypatch, capsys):
    a, b = write(tmp_path / "a", "11"), write(tmp_path / "b", "110")
    for arguments, rule in (
        (("compare", a, b), "got 2 and 3 of x"),
        (("compare", a, tmp_path / "none"), "must hold records of tasks"),
    ):
        with pytest.raises(SystemExit, match=rule):
            run_cli(monkeypatch, capsys, *arguments)
    for folders, rule in ((("a",), "runs must be at least 2; got 1"), (("a", "a"), "folders must be different")):
        with pytest.raises(ValueError, match=rule):
            Compare(runs=folders)
    with Records(tmp_path / "other" / "x", {}) as file:
        file.add(record(0, True, prompt_hash="another"))
        file.add(record(1, True))
    with pytest.raises(SystemExit, match="got two for item '0' of x"):
        run_cli(monkeypatch, capsys, "compare", a, tmp_path / "other")


def test_ablation_command(tmp_path, monkeypatch, capsys):
    folders = [
        write(tmp_path / name, bits)
        for name, bits in (("base", "10000"), ("vard", "11000"), ("agto", "11100"), ("vars", "11110"))
    ]
    for number, folder in enumerate(folders[:3]):
        values = {"user": 1.5 + number, "response": 9.0}
        queries = {name: {"overall": {"vas": {"value": value}}} for name, value in values.items()}
        (folder / "vas.json").write_text(json.dumps({"queries": queries}))
    text = run_cli(monkeypatch, capsys, "ablation", *folders, "--json", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["mean"] for row in rows] == [0.2, 0.4, 0.6, 0.8]
    assert [row["vas"] for row in rows] == [1.5, 2.5, 3.5, None]
    assert [row["paper_mean"] for row in rows] == [49.1, 51.0, 52.6, 56.1]
    assert [row["paper_vas"] for row in rows] == [7.5, 10.1, 13.8, 18.9]
    for part in ("20.0 (49.1)", "40.0 (51.0)", "+20.0 (+1.9)", "+20.0 (+1.6)", "+20.0 (+3.5)", "1.5 (7.5)", "- (18.9)"):
        assert part in text
    assert "over these tasks" in text
    response = [str(folder / "vas.json") for folder in folders[:3]] + [str(folders[0] / "vas.json")]
    text = run_cli(monkeypatch, capsys, "ablation", *folders, "--query", "response", "--vas", *response)
    assert "9.0 (18.9)" in text


def test_ablation_over_the_papers_benchmarks(tmp_path):
    tasks = [name for name in NAMES if name != "mmmu_pro"] + ["mmmu_pro_standard", "mmmu_pro_vision"]
    for task in tasks:
        write(tmp_path, "10", task)
    rows = ablation_rows([read_run(tmp_path)] * 4, [None] * 4)
    assert list(rows[0]["scores"]) == list(NAMES)
    console = Console(width=250, record=True, file=open("/dev/null", "w"))
    console.print(ablation_table(rows))
    text = console.export_text()
    assert "50.0 (68.2)" in text and "50.0 (59.5)" in text and "over these tasks" not in text


def test_ablation_refuses(tmp_path):
    run, other = read_run(write(tmp_path / "a", "10")), read_run(write(tmp_path / "b", "100"))
    with pytest.raises(ValueError, match="got 3 runs"):
        ablation_rows([run] * 3, [None] * 3)
    with pytest.raises(ValueError, match="compared on the same items"):
        ablation_rows([run, run, run, other], [None] * 4)
    with pytest.raises(ValueError, match="got no file"):
        read_vas(tmp_path / "none.json")
    infinite = {"queries": {"response": {"overall": {"vas": {"value": "inf"}}}}}
    (tmp_path / "vas.json").write_text(json.dumps(infinite))
    assert math.isinf(read_vas(tmp_path / "vas.json", "response"))
    with pytest.raises(ValueError, match="must hold VAS of user tokens; got \\['response'\\]"):
        read_vas(tmp_path / "vas.json")
