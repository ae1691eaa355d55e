# SPDX-License-Identifier: Apache-2.0
"""Differences and correlations by hand and against scipy."""

import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from avar_verl.tools.runs import write_json
from avar_verl.tools.stats import Bootstrap, correlate
from avar_verl.tools.vas.command import Compare
from avar_verl.tools.vas.compare import compare, differences, read_measurements, read_scores, run_compare
from avar_verl.tools.vas.statistics import by_sample, summarize_dependency, summarize_query
from tests.tools.vas.test_statistics import part, record

POSITIONS = {"queries": [2], "ratio": [[8.0]], "share": [[2.5]], "image": [[1.2]], "system": [[0.7]]}


def summary_of(scales: list[float], queries: tuple[str, ...] = ("user", "response"), **changes) -> dict:
    """A vas.json of samples whose sums are those of `part` times a scale; row i has the digest of i."""
    records = []
    for row, scale in enumerate(scales):
        response = part(scale) | {"positions": POSITIONS}
        parts = {"user": part(scale), "response": response}
        records.append(record(row, **{name: parts[name] for name in queries}))
    made = {name: summarize_query(name, records, [0], Bootstrap()) for name in queries}
    samples = by_sample(records, queries)
    return {"format": 1, "model": "m", "data": "d", "name": "m", "queries": made, "samples": samples, **changes}


def write(folder, **summaries) -> list[str]:
    paths = []
    for name, summary in summaries.items():
        (folder / name).mkdir()
        write_json(folder / name / "vas.json", summary)
        paths.append(str(folder / name / "vas.json"))
    return paths


SCALES = [0.6, 0.9, 1.1, 1.3, 0.8]


def test_a_difference_is_paired(tmp_path):
    """Every sample of b has 0.5 more of VAS than in a: the difference has no spread, though the samples have."""
    a, b = read_measurements(write(tmp_path, a=summary_of(SCALES), b=summary_of([s + 0.25 for s in SCALES])))
    out = differences(b, a, "user", Bootstrap())
    assert out["num_samples"] == 5
    assert out["vas"]["value"] == pytest.approx(0.5)
    assert out["vas"]["low"] == pytest.approx(0.5) and out["vas"]["high"] == pytest.approx(0.5)
    own = a.summary["queries"]["user"]["overall"]["vas"]
    assert own["high"] - own["low"] > 0.3
    assert out["image_mass"]["value"] == pytest.approx(0.25 * 0.3)
    assert out["ratio_of_means"]["value"] == pytest.approx(0.0) and "vas_median" not in out


def test_a_difference_is_over_the_shared_samples(tmp_path):
    """b has three of the five, one of them with another prompt: two are shared."""
    b = summary_of([1.6, 1.9, 9.0])
    b["samples"]["sample"][2] = "another"
    b["samples"]["user"]["queries"].append(None)  # A sample that b could not measure.
    for key in ("row", "sample"):
        b["samples"][key].append(a_key := {"row": 3, "sample": "3"}[key])
        assert a_key is not None
    for key in ("ratio", "share", "image", "system"):
        b["samples"]["user"][key].append(None)
    a, b = read_measurements(write(tmp_path, a=summary_of(SCALES), b=b))
    out = differences(b, a, "user", Bootstrap())
    assert out["num_samples"] == 2 and out["vas"]["value"] == pytest.approx(2 * (1.75 - 0.75))


def test_without_a_shared_sample_there_is_none(tmp_path):
    b = summary_of([1.0, 2.0])
    b["samples"]["sample"] = ["x", "y"]
    a, b = read_measurements(write(tmp_path, a=summary_of(SCALES), b=b))
    assert differences(b, a, "user", Bootstrap()) is None
    result = compare([a, b], None, Bootstrap())
    assert result["queries"]["user"]["difference"] == {"b": None}


# ---- visual dependency -----------------------------------------------------------------------------------------


def with_dependency(summary: dict, values: list[list[float] | None], corruption: str | None = "blank") -> dict:
    """A vas.json with the dependencies of tokens of every sample."""
    parts = [{} if value is None else {"dependency": value} for value in values]
    records = [record(row, **one) for row, one in enumerate(parts)]
    summary["samples"]["dependency"] = by_sample(records, ())["dependency"]
    return {**summary, "corruption": corruption, "dependency": summarize_dependency(records, Bootstrap())}


def test_dependencies_are_compared_and_correlated(tmp_path):
    """Every sample of b has 0.5 more than in a, of c 1.5 more; c has no dependency of the third sample."""
    values = [[0.0, 1.0], [2.0], [0.5], [1.0, 1.0, 4.0], [0.0]]
    dependencies = {
        "a": values,
        "b": [[value + 0.5 for value in row] for row in values],
        "c": [[value + 1.5 for value in row] if at != 2 else None for at, row in enumerate(values)],
    }
    files = write(tmp_path, **{name: with_dependency(summary_of(SCALES), rows) for name, rows in dependencies.items()})
    scores = tmp_path / "scores.csv"
    scores.write_text("name,score\na,1\nb,2\nc,9\n")
    console = Console(file=io.StringIO(), width=160)
    result = run_compare(Compare(files, scores, tmp_path / "out"), console)
    entry = result["dependency"]
    assert entry["corruption"] == "blank" and entry["num_samples"] == {"a": 5, "b": 5, "c": 4}
    means = [0.5, 2.0, 0.5, 2.0, 0.0]
    assert entry["overall"]["a"]["dependency"]["value"] == pytest.approx(sum(means) / 5)
    for name, more, shared in (("b", 0.5, 5), ("c", 1.5, 4)):
        difference = entry["difference"][name]
        assert difference["num_samples"] == shared and difference.keys() == {"num_samples", "dependency"}
        assert [difference["dependency"][key] for key in ("value", "low", "high")] == [pytest.approx(more)] * 3
    x = [entry["overall"][name]["dependency"]["value"] for name in "abc"]
    found = entry["correlation"]["dependency"]["score"]
    assert found["pearson"]["value"] == pytest.approx(stats.pearsonr(x, [1, 2, 9]).statistic)
    assert found["spearman"]["value"] == pytest.approx(1.0)
    printed, html = console.file.getvalue(), (tmp_path / "out" / "compare.html").read_text()
    assert "paired difference from a, responses" in printed and "dependency of responses against scores" in printed
    section = html[html.index('<section id="dependency">') :]
    assert f"Pearson {found['pearson']['value']:.2f}" in section and "a blank image" in section
    assert section.count("<svg") == 3 and "<th>Band</th>" not in section  # Values, positions, scores.


@pytest.mark.parametrize("other", ["swap", None])
def test_dependencies_on_other_corruptions_are_not_compared(tmp_path, other):
    a = with_dependency(summary_of(SCALES), [[0.0]] * 5)
    b = summary_of(SCALES) if other is None else with_dependency(summary_of(SCALES), [[1.0]] * 5, other)
    console = Console(file=io.StringIO(), width=200)
    result = run_compare(Compare(tuple(write(tmp_path, a=a, b=b)), out=tmp_path / "out"), console)
    assert result["dependency"] is None and result["uncompared"] == {"a": "blank", "b": other}
    said = f"here a: blank, b: {other or 'not measured'}."
    assert said in console.file.getvalue() and said in (tmp_path / "out" / "compare.html").read_text()


def test_dependency_alone_is_compared(tmp_path):
    files = write(tmp_path, **{name: with_dependency(summary_of(SCALES, ()), [[1.0]] * 5) for name in "ab"})
    result = compare(read_measurements(files), None, Bootstrap())
    assert result["queries"] == {} and result["dependency"]["difference"]["b"]["dependency"]["value"] == 0.0


# ---- correlation -----------------------------------------------------------------------------------------------


def test_correlations_are_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=9), rng.normal(size=9)
    y[3] = y[4]  # A tie.
    out = correlate(x, y, Bootstrap())
    assert out["pearson"]["value"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert out["spearman"]["value"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert out["num_models"] == 9 and out["undefined"] == 0
    for name in ("pearson", "spearman"):
        assert -1 <= out[name]["low"] < out[name]["value"] < out[name]["high"] <= 1


def test_the_interval_is_that_of_a_plain_bootstrap():
    x, y = [1.0, 2.0, 4.0, 3.0, 6.0], [1.0, 3.0, 2.0, 5.0, 4.0]
    out = correlate(x, y, Bootstrap(num_draws=100, seed=5))
    drawn = np.random.default_rng(5).integers(5, size=(100, 5))
    values = []
    for index in drawn:
        if len(set(index)) > 1:
            values.append(stats.pearsonr(np.take(x, index), np.take(y, index)).statistic)
    assert out["undefined"] == 100 - len(values)
    ranked = sorted(values)
    assert out["pearson"]["low"] == pytest.approx(ranked[math.ceil(0.025 * len(ranked)) - 1])
    assert out["pearson"]["high"] == pytest.approx(ranked[math.ceil(0.975 * len(ranked)) - 1])


def test_by_hand():
    """Deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6). Ranks (1, 2, 3) and (1, 2.5, 2.5)."""
    out = correlate([1.0, 2.0, 3.0], [0.0, 3.0, 3.0], Bootstrap())
    assert out["pearson"]["value"] == pytest.approx(3 / math.sqrt(12))
    assert out["spearman"]["value"] == pytest.approx(1.5 / math.sqrt(2 * 1.5))
    assert out["undefined"] > 0  # Draws of one checkpoint, or of the two that score the same.


def test_what_has_no_correlation_is_nan():
    flat = correlate([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], Bootstrap())
    assert math.isnan(flat["pearson"]["value"]) and flat["pearson"]["low"] is None and flat["undefined"] == 1000
    high = correlate([1.0, math.inf, 3.0], [1.0, 2.0, 3.0], Bootstrap())
    assert math.isnan(high["pearson"]["value"]) and high["spearman"]["value"] == pytest.approx(0.5)


def test_scores(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("name,mathvista,mmstar\nb,60,70\nextra,1,2\na,50,40\n")
    assert read_scores(path, ["a", "b"]) == {"mathvista": [50, 60], "mmstar": [40, 70], "mean": [45, 65]}
    path.write_text("name,mathvista\na,50\nb,60\n")
    assert read_scores(path, ["b", "a"]) == {"mathvista": [60, 50]}


@pytest.mark.parametrize(
    "text, message",
    [
        ("model,score\na,1\n", "a column `name`"),
        ("name\na\n", "one for every benchmark"),
        ("", "a column `name`"),
        ("name,score\na,1\n", r"a row for every checkpoint; got none for \['b'\]"),
        ("name,score\na,1\nb,\n", "finite numbers; got '' for b in score"),
        ("name,score\na,1\nb,nan\n", "finite numbers; got 'nan' for b"),
        ("name,score\na,1\nb\n", "finite numbers; got None for b"),
    ],
)
def test_scores_that_are_refused(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_scores(path, ["a", "b"])
    with pytest.raises(ValueError, match="scores must be a CSV file"):
        read_scores(tmp_path / "none.csv", ["a"])


# ---- files -----------------------------------------------------------------------------------------------------


def test_names(tmp_path):
    a, b = write(tmp_path, a=summary_of(SCALES), b=summary_of(SCALES))
    assert [one.name for one in read_measurements([a, f"mine={b}"])] == ["a", "mine"]
    with pytest.raises(ValueError, match="names of their own; got 'a' twice"):
        read_measurements([a, f"a={b}"])


def test_files_that_are_refused(tmp_path):
    [a] = write(tmp_path, a=summary_of(SCALES))
    with pytest.raises(ValueError, match="at least two files; got 1"):
        read_measurements([a])
    (tmp_path / "report.json").write_text('{"seconds": 1}')
    (tmp_path / "text.json").write_text("no json")
    for name in ("report.json", "text.json", "none.json"):
        with pytest.raises(ValueError, match=f"{name} must be a vas.json"):
            read_measurements([a, f"b={tmp_path / name}"])
    [user] = write(tmp_path, user=summary_of(SCALES, ("user",)))
    [response] = write(tmp_path, response=summary_of(SCALES, ("response",)))
    with pytest.raises(ValueError, match=r"a query role or a dependency that all have; got .*\(\['user'\], None\)"):
        read_measurements([user, response])
    assert list(compare(read_measurements([a, user]), None, Bootstrap())["queries"]) == ["user"]


def test_two_checkpoints_have_no_correlation(tmp_path):
    both = read_measurements(write(tmp_path, a=summary_of(SCALES), b=summary_of(SCALES)))
    with pytest.raises(ValueError, match="at least 3 checkpoints; got 2"):
        compare(both, {"score": [1, 2]}, Bootstrap())


def test_the_report(tmp_path):
    """Three checkpoints with scores: VAS 1.88, 2.82, 5.64 times two thirds; the last one has an infinite sample."""
    sick = summary_of([3.0, 3.0])
    sick["queries"]["response"]["overall"]["vas"] = {"value": math.inf, "low": 1.0, "high": math.inf}
    files = write(tmp_path, a=summary_of(SCALES), b=summary_of([1.5 * s for s in SCALES]), c=sick)
    scores = tmp_path / "scores.csv"
    scores.write_text("name,mathvista,mmstar\na,50,60\nb,55,61\nc,70,70\n")
    console = Console(file=io.StringIO(), width=160)
    result = run_compare(Compare(files, scores, tmp_path / "out"), console)
    printed, html = console.file.getvalue(), (tmp_path / "out" / "compare.html").read_text()
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == result
    assert "paired difference from a" in printed and "mean" in printed and "[" in printed
    pearson = result["queries"]["user"]["correlation"]["vas"]["mean"]["pearson"]["value"]
    assert pearson == pytest.approx(stats.pearsonr([1.88, 2.82, 6.0], [55, 58, 70]).statistic)
    assert f"Pearson {pearson:.2f}" in html
    assert result["queries"]["response"]["correlation"]["vas"]["mean"]["pearson"]["value"] == "nan"
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", html) and "<script" not in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert html.count("<svg") >= 14
