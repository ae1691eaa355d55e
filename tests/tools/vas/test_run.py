# SPDX-License-Identifier: Apache-2.0
"""`avar vas` from data to report: what it writes, resumes, refuses."""

import json
import re
import sys
import typing

import pytest
from transformers import AutoConfig

from avar_verl.data.rows import batched
from avar_verl.model.checkpoint import Checkpoint
from avar_verl.objectives.dependency import CORRUPTIONS
from avar_verl.objectives.vas import STATISTICS
from avar_verl.tools import cli
from avar_verl.tools.demo import photo_grid
from avar_verl.tools.demo.measure import measure_vas
from avar_verl.tools.rows import conversation
from avar_verl.tools.vas import run as vas_run
from avar_verl.tools.vas import work
from avar_verl.tools.vas.command import Vas
from avar_verl.tools.vas.run import run_vas
from avar_verl.tools.vas.score import Scorer, image_features
from tests.model.families.tiny import sample_messages
from tests.tools.vas.conftest import assert_same

# Whole commands.
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sft.parquet"
    photo_grid.make_sft_parquet(path, 7, 0, "test")
    return str(path)


@pytest.fixture(scope="module")
def rl(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rl.parquet"
    photo_grid.make_rl_parquet(path, 3, 0, "test")
    return str(path)


@pytest.fixture(scope="module")
def measured(tiny_model_path, sft, tmp_path_factory):
    """(folder, what vas.json holds) of a finished run."""
    out = tmp_path_factory.mktemp("vas")
    return out, run_vas(Vas(str(tiny_model_path), sft, batch_size=3, show=2, out=out))


@pytest.fixture(scope="module")
def swapped(tiny_model_path, sft, tmp_path_factory):
    """(folder, what vas.json holds) of a finished run with a dependency."""
    out = tmp_path_factory.mktemp("swap")
    return out, run_vas(Vas(str(tiny_model_path), sft, dependency="swap", batch_size=3, show=2, out=out))


def records_in(out) -> dict[int, dict]:
    return {record["row"]: record for record in map(json.loads, (out / "records.jsonl").read_text().splitlines())}


def no_model(monkeypatch):
    monkeypatch.setattr(work, "Worker", lambda _work: pytest.fail("a model was loaded"))


def numbers_of(summary: dict) -> dict:
    return {key: summary[key] for key in ("queries", "samples")}


def test_files_change_no_number(measured, tiny_model_path):
    """Through files, records and JSON the numbers are those that the demo measures in memory."""
    _, summary = measured
    samples = photo_grid.make_samples(7, 0, "test")
    for name, expected in measure_vas(Checkpoint.load(tiny_model_path), samples).items():
        query = summary["queries"][name]
        assert (query["num_samples"], query["skipped"], query["band"]) == (7, {}, "narrow")
        assert_same(query, expected, rel=1e-6)
        for key in STATISTICS:
            part = query["overall"][key]
            assert part["low"] <= part["value"] <= part["high"] and part["low"] < part["high"]
        assert [len(query["layers"][key]["value"]) for key in ("vas", "image_share")] == [4, 4]


def test_what_a_folder_holds(measured):
    out, summary = measured
    names = ["records.jsonl", "report.html", "settings.json", "vas.json", "words.json"]
    assert sorted(file.name for file in out.iterdir()) == names
    assert json.loads((out / "vas.json").read_text(), parse_constant=pytest.fail) == summary
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(7))
    # The photo grid's user turn opens with four tokens before its image.
    assert all(record["user"]["before_image"] == 4 and record["response"]["before_image"] == 0 for record in records)
    positions = summary["queries"]["response"]["positions"]
    assert [one["first"] for one in positions[:4]] == [0, 4, 8, 12] and positions[0]["num_samples"] == 7
    assert sum(one["num_queries"] for one in positions) == summary["queries"]["response"]["num_queries"]


def test_the_report_stands_alone_and_says_the_numbers(measured):
    out, summary = measured
    html = (out / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", html) and "<script" not in html
    for name in ("user", "response"):
        share = summary["queries"][name]["overall"]["image_share"]
        assert f"{share['value']:.3f}" in html
    assert "28 of" in html and "are before the first image" in html
    assert (
        html.count("<mark>") == 8 and html.count('alt="Where the model looks as it writes ') == 8
    )  # Two samples of four words.
    assert 'id="positions"' in html and 'id="images"' not in html  # One image a sample.
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_a_finished_run_loads_no_model(measured, tiny_model_path, sft, monkeypatch):
    out, summary = measured
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    no_model(monkeypatch)
    again = run_vas(Vas(str(tiny_model_path), sft, batch_size=5, show=2, out=out))
    assert numbers_of(again) == numbers_of(summary)

    def without_time(html):
        return re.sub(r"<tr><td[^>]*>seconds.*", "", html)

    assert without_time((out / "report.html").read_text()) == without_time(before)


def test_batches_and_more_rows_later_change_nothing(measured, tiny_model_path, sft, tmp_path):
    """Three rows, then all in other batches, one of whose records a kill has cut short."""
    _, summary = measured
    settings = {"model": str(tiny_model_path), "data": sft, "show": 0}
    assert run_vas(Vas(**settings, n=3, batch_size=2, out=tmp_path))["num_rows"] == 3
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    measured_again = []
    original = work.Worker.measure

    def measure(self, batch):
        measured_again.extend(job.row.index for job in batch)
        return original(self, batch)

    work.Worker.measure = measure
    try:
        whole = run_vas(Vas(**settings, batch_size=4, out=tmp_path))
    finally:
        work.Worker.measure = original
    assert measured_again == [2, 3, 4, 5, 6]
    assert_same(whole["queries"], summary["queries"])
    assert run_vas(Vas(**settings, n=3, out=tmp_path))["num_rows"] == 3  # Of the seven that are there.


@pytest.mark.parametrize(
    "change", [{"query": "user"}, {"layers": (1,)}, {"dtype": "bfloat16"}, {"system": "Hm."}, {"dependency": "blank"}]
)
def test_other_settings_do_not_mix(measured, tiny_model_path, sft, change, monkeypatch):
    out, _ = measured
    no_model(monkeypatch)
    with pytest.raises(ValueError, match="other settings; got "):
        run_vas(Vas(str(tiny_model_path), sft, **change, out=out))


def test_a_path_may_be_given_in_another_way(measured, tiny_model_path, sft, monkeypatch):
    out, summary = measured
    no_model(monkeypatch)
    monkeypatch.chdir(tiny_model_path.parent)
    again = run_vas(Vas(tiny_model_path.name, sft, show=2, out=out))
    assert again["model"] == summary["model"] == str(tiny_model_path)
    assert vas_run.absolute("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_generated_responses(tiny_model_path, rl, tmp_path):
    """RL rows have none of their own. What was generated is in the records and is what was measured."""
    settings = {"model": str(tiny_model_path), "data": rl, "show": 1}
    with pytest.raises(ValueError, match=r"row 0 of .*rl.parquet: response queries need a response.*--generate"):
        run_vas(Vas(**settings))
    assert list(run_vas(Vas(**settings, query="user"))["queries"]) == ["user"]
    summary = run_vas(Vas(**settings, generate=True, max_new_tokens=5, out=tmp_path))
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    lengths = [len(record["generated_ids"]) for record in records]
    assert lengths == [record["response"]["queries"] for record in records] and max(lengths) <= 5
    assert summary["queries"]["response"]["num_queries"] == sum(lengths) and "generated" in records[0]
    [shown] = json.loads((tmp_path / "words.json").read_text())["samples"]
    assert shown["response"] == records[0]["generated"].strip()

    # The same ids, given, score the same.
    rows = [{"prompt": [{"role": "user", "content": f"<image>{one.question}"}], "response_ids": record["generated_ids"]}
            for one, record in zip(photo_grid.make_samples(3, 0, "test"), records, strict=True)]  # fmt: skip
    given = tmp_path / "given.jsonl"
    for row, one in zip(rows, photo_grid.make_samples(3, 0, "test"), strict=True):
        one.image.save(tmp_path / f"{one.index}.png")
        row["images"] = [str(tmp_path / f"{one.index}.png")]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = run_vas(Vas(str(tiny_model_path), str(given)))
    assert_same(again["queries"], summary["queries"])
    assert again["samples"]["sample"] == summary["samples"]["sample"]


def test_images_and_skipped_samples_are_in_the_report(family_path, tmp_path):
    """Two images, text only, and a conversation without the system turn that Qwen3-VL's template does not write."""
    rows = []
    for number, (n_images, system) in enumerate([(2, True), (1, True), (0, True), (1, False)]):
        row = {"messages": [], "images": []}
        for message in sample_messages(n_images, system=system, seed=number):
            blocks = message["content"]
            if not isinstance(blocks, str):
                for block in blocks:
                    if block["type"] == "image":
                        path = tmp_path / f"{number}-{len(row['images'])}.png"
                        block["image"].save(path)
                        row["images"].append(str(path))
                blocks = "".join("<image>" if block["type"] == "image" else block["text"] for block in blocks)
            row["messages"].append({"role": message["role"], "content": blocks})
        rows.append(row)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": str(family_path("qwen3_vl")), "data": str(data)}
    summary = run_vas(Vas(**settings, show=1, out=tmp_path / "out"))
    query = summary["queries"]["user"]
    assert query["skipped"] == {"no image": 1, "no system turn": 1} and query["num_samples"] == 2
    assert [image["num_samples"] for image in query["images"]] == [2, 1]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 4 samples have no VAS of user tokens: no image." in html and "no system turn." in html
    assert 'id="images"' in html and html.count(", image ") >= 1
    assert run_vas(Vas(**settings, system="Look."))["queries"]["user"]["skipped"] == {"no image": 1}


# ---- visual dependency -----------------------------------------------------------------------------------------


def test_dependency_of_a_file(measured, swapped, tiny_model_path):
    """In records, summary and report; the masses are those of a run without it."""
    out, summary = swapped
    records = records_in(out)
    assert [records[row]["partner"] for row in range(7)] == [1, 2, 3, 4, 5, 6, 0]
    samples = photo_grid.make_samples(7, 0, "test")
    scorer = Scorer(Checkpoint.load(tiny_model_path), queries=(), corruption="swap")
    conversations = [conversation(one.row) for one in samples]
    partners = [image_features(scorer.checkpoint.processor, one.images) for one in conversations]
    expected = scorer.score(scorer.prepare(conversations), partners[1:] + partners[:1])
    means = []
    for row, one in enumerate(expected):
        assert records[row]["dependency"] == pytest.approx(one["dependency"], abs=1e-5)
        means.append(sum(one["dependency"]) / len(one["dependency"]))
    dependency = summary["dependency"]
    assert (dependency["num_samples"], dependency["skipped"], summary["corruption"]) == (7, {}, "swap")
    assert dependency["num_tokens"] == summary["queries"]["response"]["num_queries"]
    assert dependency["overall"]["value"] == pytest.approx(sum(means) / 7, abs=1e-5)
    assert dependency["overall"]["low"] < dependency["overall"]["value"] < dependency["overall"]["high"]
    assert summary["samples"]["dependency"]["dependency"] == pytest.approx(means, abs=1e-5)
    assert_same(summary["queries"], measured[1]["queries"])
    assert measured[1]["dependency"] is None and "dependency" not in measured[1]["samples"]

    html = (out / "report.html").read_text()
    assert 'id="dependency"' in html and f"{dependency['overall']['value']:.3f}" in html
    assert "the image of another row" in html and html.count('<span style="background: rgba(') > 20
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    [first, _] = json.loads((out / "words.json").read_text())["samples"]
    text = "".join(part for part, _ in first["dependency"])
    assert text.strip() == first["response"]
    assert 'id="dependency"' not in (measured[0] / "report.html").read_text()


def test_partners_stay_whatever_is_measured_when(swapped, tiny_model_path, sft, tmp_path, monkeypatch):
    """Three rows, one of which a kill has cut short, then all in other batches; then once more without a model."""
    settings = {"model": str(tiny_model_path), "data": sft, "show": 0, "dependency": "swap", "out": tmp_path}
    assert run_vas(Vas(**settings, n=3, batch_size=2))["dependency"]["num_samples"] == 3
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    whole = run_vas(Vas(**settings, batch_size=5))
    for row, record in records_in(swapped[0]).items():
        again = records_in(tmp_path)[row]
        assert record["partner"] == again["partner"]
        assert record["dependency"] == pytest.approx(again["dependency"], abs=1e-5)
    assert whole["dependency"]["overall"]["value"] == pytest.approx(
        swapped[1]["dependency"]["overall"]["value"], abs=1e-5
    )
    no_model(monkeypatch)
    monkeypatch.setattr(vas_run, "looks_of", lambda *_: pytest.fail("partners were sought"))
    assert run_vas(Vas(**settings))["dependency"] == whole["dependency"]
    for other in ("blank", None):
        with pytest.raises(ValueError, match="other settings; got corruption: 'swap' there"):
            run_vas(Vas(**{**settings, "dependency": other}))


def test_dependency_of_generated_responses(tiny_model_path, rl):
    settings = {"model": str(tiny_model_path), "data": rl, "dependency": "blank"}
    with pytest.raises(ValueError, match=r"row 0 of .*rl.parquet: dependency needs a response.*--generate"):
        run_vas(Vas(**settings, query="none"))
    summary = run_vas(Vas(**settings, generate=True, max_new_tokens=5))
    assert summary["dependency"]["num_tokens"] == summary["queries"]["response"]["num_queries"]


def test_a_family_without_masses_has_a_dependency(family_path, sft, tmp_path):
    model = str(family_path("mllama"))
    with pytest.raises(ValueError, match="no VAS of this family. .*--query none --dependency blank"):
        run_vas(Vas(model, sft, dependency="blank"))
    summary = run_vas(Vas(model, sft, query="none", dependency="blank", n=3, show=1, out=tmp_path))
    assert summary["queries"] == {} and summary["dependency"]["num_samples"] == 3
    assert summary["dependency"]["overall"]["value"] != 0
    html = (tmp_path / "report.html").read_text()
    assert "<h1>Visual dependency of " in html and 'id="heads"' not in html and 'id="numbers"' not in html
    assert 'title="' in html and html.count('class="text dependency"') == 1
    assert "Where the model looks" not in html


def test_rows_without_an_image_or_a_partner(tiny_model_path, tmp_path):
    """Text alone has no dependency; a picture that no other row can replace is refused before the model is loaded."""
    first, second = photo_grid.make_samples(2, 0, "test")
    for name, image in (("a", first.image), ("b", second.image), ("wide", second.image.resize((224, 112)))):
        image.save(tmp_path / f"{name}.png")
    text = {"question": "What?", "response": "That."}
    a, b, wide = ({**text, "image": str(tmp_path / f"{name}.png")} for name in ("a", "b", "wide"))

    def run(*rows, **settings):
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run_vas(Vas(str(tiny_model_path), str(data), query="none", **settings))

    summary = run(a, text, b, dependency="swap")
    assert summary["dependency"]["skipped"] == {"no image": 1} and summary["dependency"]["num_samples"] == 2
    assert summary["samples"]["dependency"]["queries"][1] is None
    message = r"row 2 of .*rows.jsonl: dependency=swap needs another row .*; got none, for this row and 0 more"
    with pytest.raises(ValueError, match=message):
        run(a, b, wide, dependency="swap")
    assert run(a, b, wide, dependency="swap", n=2)["num_rows"] == 2
    with pytest.raises(ValueError, match="row 0 of .* for this row and 1 more"):
        run(a, text, a, dependency="swap")  # The same picture.
    assert run(a, b, wide, dependency="blank")["dependency"]["num_samples"] == 3
    with pytest.raises(
        ValueError, match=r"dependency needs samples with an image.*got none in 1 samples \(no image: 1"
    ):
        run(text, dependency="blank")


def test_the_choice_of_corruptions_is_the_core_s():
    hint = typing.get_type_hints(Vas)["dependency"]
    assert typing.get_args(typing.get_args(hint)[0]) == CORRUPTIONS


# ---- rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n": -1}, "n must be at least 0; got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"ray": -1}, "ray must be at least 0"),
        ({"show": -1}, "show must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"query": "image"}, "query must be one of .* got 'image'"),
        ({"layers": ()}, "layers must be at least 1; got 0"),
        ({"resamples": 99}, "resamples must be at least 100; got 99"),
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
        ({"dependency": "noise"}, "dependency must be one of .* got 'noise'"),
        ({"query": "none"}, "query=none leaves dependency to measure; got none"),
        ({"query": "none", "dependency": "blank", "layers": (1,)}, r"layers are those .* got \(1,\) and query=none"),
    ],
)
def test_settings_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Vas("m", "d", **change)


def test_columns_have_known_names():
    with pytest.raises(ValueError, match=r"columns must name some of .* got \['picture'\]"):
        run_vas(Vas("m", "d", columns={"picture": "x"}))


def test_a_model_is_checked_before_it_is_loaded(family_path, sft, tmp_path, monkeypatch):
    no_model(monkeypatch)
    with pytest.raises(ValueError, match="window of 64"):
        run_vas(Vas(str(family_path("gemma3")), sft, layers=(0,)))
    with pytest.raises(ValueError, match="no VAS of this family"):
        run_vas(Vas(str(family_path("mllama")), sft))
    with pytest.raises(ValueError, match="a model must be a Hugging Face folder"):
        run_vas(Vas(str(tmp_path / "nothing"), sft))
    AutoConfig.for_model("qwen2").save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="known model family; got model_type='qwen2'"):
        run_vas(Vas(str(tmp_path / "text"), sft))


def test_a_report_that_cannot_be_made_is_said_first(measured, tiny_model_path, sft, tmp_path, monkeypatch):
    monkeypatch.setattr(vas_run.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else True)
    with pytest.raises(ValueError, match=r"needs matplotlib; got none. pip install 'avar-verl\[vas\]'"):
        run_vas(Vas(str(tiny_model_path), sft, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_no_sample_with_vas_is_an_error(tiny_model_path, tmp_path):
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"question": "What?", "response": "That."}) + "\n")
    with pytest.raises(ValueError, match=r"got none for user queries in 1 samples \(no image: 1\)"):
        run_vas(Vas(str(tiny_model_path), str(data)))


def test_a_broken_row_is_named_and_what_was_measured_stays(tiny_model_path, tmp_path):
    samples = photo_grid.make_samples(3, 0, "test")
    rows = []
    for one in samples:
        one.image.save(tmp_path / f"{one.index}.png")
        rows.append({"question": one.question, "response": one.response, "image": str(tmp_path / f"{one.index}.png")})
    rows[2]["image"] = str(tmp_path / "missing.png")
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"row 2 of .*rows.jsonl: an image file must exist; got '.*missing.png'"):
        run_vas(Vas(str(tiny_model_path), str(data), batch_size=1, out=out))
    assert len((out / "records.jsonl").read_text().splitlines()) == 2


def test_batches():
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]] and list(batched([], 2)) == []


def test_the_command(tiny_model_path, sft, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["avar", "vas", *map(str, arguments)])
        cli.main()
        return capsys.readouterr().out

    options = ["--model", tiny_model_path, "--data", sft, "--n", "2", "--device", "cpu"]
    assert "vas_median" in run(*options, "--query", "user", "--layers", "0", "-1")
    printed = run(*options, "--out", tmp_path / "a", "--show", "1", "--words", "shows")
    assert "report.html" in printed and "image_share" in printed
    assert json.loads((tmp_path / "a" / "words.json").read_text())["choice"]["words"] == ["shows"]
    printed = run(*options, "--query", "none", "--dependency", "swap")
    assert "visual dependency of" in printed and "the image of another row" in printed and "vas_median" not in printed
    both = ["--model", "x", "--data", "x"]
    for wrong, message in [
        (["--model", "x"], "--data"),
        (["--data", "x"], "--model"),
        ([*both, "--dependency", "noise"], "noise"),
        ([*both, "--query", "none"], "--dependency blank"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            run(*wrong)
        assert message in capsys.readouterr().err
