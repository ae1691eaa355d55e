# SPDX-License-Identifier: Apache-2.0
"""Parquet files, card, browser, estimate and the commands, on photo grids answered in this process."""

import asyncio
import json
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest

from avar_verl.data.check import Settings, check_files
from avar_verl.tools import cli
from avar_verl.tools.synth.card import bars, mark, pick, read_records, write_browser, write_card
from avar_verl.tools.synth.chain import advance
from avar_verl.tools.synth.estimate import estimate
from avar_verl.tools.synth.gates import Verdict, judge
from avar_verl.tools.synth.output import Writer
from avar_verl.tools.synth.store import Store
from examples.synth.kill_and_resume import CONFIG
from tests.tools.synth.conftest import LocalStore


@pytest.fixture
def finished(process_all, example_server, items, tmp_path):
    """(config, summary) of a run with wrong answers and flaws, written into the folder of the config."""

    def run(*overrides: str):
        config, store, _ = process_all(example_server(wrong=0.4, flawed=0.4), items, *overrides)

        async def judged(item):
            return judge(config, item, await advance(config, item, LocalStore(store).get))

        writer = Writer(tmp_path / "out", config)
        for item in items:
            writer.add(item, asyncio.run(judged(item)))
        summary = writer.close(keep=True)
        summary["calls"], summary["run"] = store.by_stage(), {**store.totals(), "seconds": 1.0}
        write_card(config, summary)
        store.close()
        return config, summary

    return run


def test_rows_are_what_the_trainers_read(finished, tmp_path):
    _, summary = finished("output.system='Look first.'")
    out = tmp_path / "out"
    for kind in ("sft", "rl"):
        report = check_files([out / f"{kind}.parquet"], Settings(kind))
        assert report.count("error") == 0, report.as_dict()
    rows = pq.read_table(out / "sft.parquet").to_pylist()
    assert len(rows) == summary["accepted"] < summary["inputs"] == 24
    for row in rows:
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][1]["content"].startswith("<image>") and len(row["boxes"][0]) == 4
        assert row["messages"][2]["content"].startswith("<think>")
    rl = pq.read_table(out / "rl.parquet").to_pylist()
    assert [row["extra_info"]["index"] for row in rl] == list(range(len(rl)))
    assert rl[0]["extra_info"]["boxes_size"] == [112, 112] and len(rl[0]["extra_info"]["boxes"]) == 4


def test_nothing_is_lost(finished, items, tmp_path):
    _, summary = finished()
    records = list(read_records(tmp_path / "out"))
    assert [(record["source"], record["row"]) for record in records] == [(item.source, item.row) for item in items]
    assert sum(not record["gate"] for record in records) == summary["accepted"]
    assert all(record["gate"] in record["failed"] for record in records if record["gate"])
    assert sum(part["first"] for part in summary["gates"].values()) == summary["rejected"]


def test_rl_rows_of_all_inputs(finished, tmp_path):
    finished("output.rl_from=inputs")
    assert pq.read_metadata(tmp_path / "out" / "rl.parquet").num_rows == 24


def test_without_boxes(make_config, grid_item, tmp_path):
    config = make_config()
    writer = Writer(tmp_path / "out", config)
    verdict = Verdict(reasoning="r", answer="a")
    writer.add(grid_item(0, boxes=()), verdict)
    writer.close(keep=True)
    assert pq.read_table(tmp_path / "out" / "sft.parquet")["boxes"].to_pylist() == [[[]]]
    info = pq.read_table(tmp_path / "out" / "rl.parquet")["extra_info"].to_pylist()[0]
    assert info["boxes"] is None and info["boxes_size"] is None


def test_near_duplicates_are_rejected_in_order(make_config, grid_item, tmp_path):
    writer = Writer(tmp_path / "out", make_config())
    verdicts = [Verdict(reasoning="the top left of it shows a cat " * 5, answer="a") for _ in range(2)]
    for number, verdict in enumerate(verdicts):
        writer.add(grid_item(0, row=number), verdict)
    summary = writer.close(keep=True)
    assert verdicts[1].failed == {"near_duplicate": "it nearly repeats grid.parquet row 0"}
    assert summary["gates"]["near_duplicate"] == {"first": 1, "any": 1}


def test_a_run_that_stops_leaves_the_files_of_the_one_before(make_config, grid_item, tmp_path):
    for keep, row in ((True, 1), (False, 2)):
        writer = Writer(tmp_path / "out", make_config())
        writer.add(grid_item(0, row=row), Verdict(reasoning="r", answer="a"))
        writer.close(keep=keep)
    assert [record["row"] for record in read_records(tmp_path / "out")] == [1]
    assert not list((tmp_path / "out").glob("new-*"))


# ---- card and browser --------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.places, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        if "data-place" in attributes:
            self.places.append((tag, attributes["data-place"]))

    handle_startendtag = handle_starttag


def test_the_browser_needs_nothing_else_and_draws_every_box(finished, tmp_path):
    _, summary = finished()
    page = _Page()
    text = (tmp_path / "out" / "card.html").read_text()
    page.feed(text)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert page.tags.count("article") == 24
    drawn = sum(tag == "rect" for tag, _ in page.places)
    assert drawn and drawn == sum(tag == "span" for tag, _ in page.places)
    for gate, part in summary["gates"].items():
        assert (f'data-show="{gate}"' in text) == bool(part["first"])


def test_text_of_a_model_is_escaped():
    html, places = mark("<script>alert(1)</script> the image shows a cat at [10, 10, 50, 60].", (100, 100), "absolute")
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert places == [{"number": 0, "coords": (10, 10, 50, 60)}]
    assert '<span class="phrase">the image shows</span>' in html


def test_marks_may_cross():
    html, _ = mark("A cat. Wait, according to the description in the image it sits.", None, "absolute")
    assert (
        'class="check leak"' in html
        and html.striptags() == "A cat. Wait, according to the description in the image it sits."
    )


def test_pick_takes_from_every_gate(finished, tmp_path):
    finished()
    gates = {record["gate"] for record in read_records(tmp_path / "out")}
    picked = pick(tmp_path / "out", 12)
    assert len(picked) == 12 and {record["gate"] for record in picked} == gates
    assert sum(not record["gate"] for record in picked) == 6
    assert {record["gate"] for record in pick(tmp_path / "out", 3, "answer")} == {"answer"}
    assert (
        write_browser(
            tmp_path / "out", json.loads((tmp_path / "out/summary.json").read_text()), tmp_path / "b.html", 2, ""
        )
        == 2
    )


def test_bars():
    assert bars([1, 1, 3]) == [("1", 2, 1.0), ("2", 0, 0.0), ("3", 1, 0.5)]
    assert [count for _, count, _ in bars([0.0, 100.0])] == [1, *[0] * 8, 1]


def test_the_card_has_every_number(finished, tmp_path):
    _, summary = finished()
    card = (tmp_path / "out" / "card.md").read_text()
    assert f"{summary['accepted']} samples accepted of 24 inputs" in card
    for words in (
        "inputs.parquet",
        "photo-grid-vision",
        "describe_v1 (",
        "## Gates",
        "seed 0",
        "words of the reasoning",
    ):
        assert words in card
    for gate, part in summary["gates"].items():
        assert (f"| {gate} | {part['first']} | {part['any']} |" in card) == bool(part["any"])


# ---- estimate ----------------------------------------------------------------------------------------------------


def test_estimate_before_anything(make_config, items, tmp_path):
    config = make_config(
        "stages.reason.expected_tokens=100", "models.thinker.input_usd=0", "models.thinker.output_usd=6"
    )
    found = estimate(config, [*items[:4], items[0]], Store(tmp_path / "c.sqlite"))
    assert (found.inputs, found.ended, found.skipped) == (5, 0, 0)
    # The fifth is the first once more: one request.
    assert [part.calls for part in found.stages.values()] == [4, 4, 4]
    reason = found.stages["reason"]
    assert reason.output_tokens == 400 and reason.usd == pytest.approx(400 * 6 / 1e6)
    assert reason.most_usd == pytest.approx(4 * 4096 * 6 / 1e6)


def test_estimate_is_what_a_run_calls(process_all, example_server, make_config, items, tmp_path):
    config, store, _ = process_all(example_server(wrong=0.0), items[:10])
    found = estimate(config, items, store)
    assert [part.calls for part in found.stages.values()] == [14, 14, 14] and found.ended == 10
    assert [part.cached for part in found.stages.values()] == [10, 10, 10]
    assert found.stages["describe"].measured == 10
    mean = store.means()["describe", "photo-grid-vision"][2]
    assert found.stages["describe"].output_tokens == 14 * round(mean)
    _, store, _ = process_all(example_server(wrong=0.0), items, store=store)
    assert sum(part.calls for part in estimate(config, items, store).stages.values()) == 0


# ---- commands ----------------------------------------------------------------------------------------------------


def command(monkeypatch, *args: str) -> str | None:
    """Run `avar synth ...`; what it exits with."""
    monkeypatch.setattr("sys.argv", ["avar", "synth", *args])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return None


def test_estimate_and_dry_run_call_nobody_and_write_nothing(monkeypatch, capsys, inputs, tmp_path):
    settings = ["--config", str(CONFIG), "--limit", "5", f"out={tmp_path / 'none'}", f"input.files=[{inputs}]"]
    assert command(monkeypatch, "estimate", *settings) is None
    assert "15 calls" in capsys.readouterr().out
    assert command(monkeypatch, "run", "--dry-run", *settings) is None
    out = capsys.readouterr().out
    assert "describe: photo-grid-vision, 1 images" in out and "(description)" in out and "What does the" in out
    assert not (tmp_path / "none").exists()


def test_inspect(monkeypatch, capsys, finished, tmp_path):
    finished()
    out = str(tmp_path / "out")
    assert command(monkeypatch, "inspect", out, "--gate", "answer", "--n", "1") is None
    shown = " ".join(capsys.readouterr().out.split())
    assert "rejected: answer" in shown and "the answer is" in shown
    assert command(monkeypatch, "inspect", out, "--html", str(tmp_path / "x.html"), "--n", "4") is None
    assert (tmp_path / "x.html").read_text().count("<article") == 4


def test_hashes(monkeypatch, capsys, inputs, tmp_path):
    assert command(monkeypatch, "hashes", str(inputs), "--out", str(tmp_path / "h.jsonl")) is None
    assert "24 questions, 0 rows left out" in " ".join(capsys.readouterr().out.split())
    assert len((tmp_path / "h.jsonl").read_text().splitlines()) == 24


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "/nowhere"], "inspect needs the folder of a run that has ended"),
        (["estimate", "--config", "/nowhere.yaml"], "--config must be a YAML file"),
        (["estimate", "--config", str(CONFIG), "input.files=[none.parquet]"], "a data file must exist"),
        (["hashes", "none.parquet", "--out", "x"], "a data file must exist"),
    ],
)
def test_errors_are_one_line(monkeypatch, args, message):
    code = command(monkeypatch, *args)
    assert code.startswith(f"avar synth {args[0]}: ") and message in code and "\n" not in code.strip()
