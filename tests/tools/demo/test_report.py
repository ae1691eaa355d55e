# SPDX-License-Identifier: Apache-2.0
"""The demo's report, on a made-up run: the same files as a real one, small and with every odd case in it."""

import base64
import functools
import html
import html.parser
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from avar_verl.tools import figures
from avar_verl.tools.demo import photo_grid, report

TITLES = {"base": "Base", "sft": "SFT", "agto": "AGTO SFT", "grpo": "GRPO", "avar": "GRPO+VARS"}
ACCURACY = {"base": 0.0, "sft": 0.625, "agto": 0.5, "grpo": 0.125, "avar": 0.5417}
VERSIONS = {"avar-verl": "0.1.0", "verl": "0.9.1", "torch": "2.11.0"}
GUIDANCE = {
    "base": None,
    "sft": {"alpha": 0.0, "beta": 0.0, "query_role": "response"},
    "agto": {"alpha": 0.02, "beta": 0.0, "query_role": "response", "image_target": 0.4},
    "grpo": {"lambda_v": 0.0},
    "avar": {"lambda_v": 0.3, "statistic": "dependency"},
}
SECTIONS = ("summary", "shares", "stages", "curves", "heatmaps", "samples", "settings")


# ---- a made-up run ---------------------------------------------------------------------------------------------


def fake_vas(share: float, rng: np.random.Generator) -> tuple[dict, dict]:
    """The summary and the heat map of one query role, 4 layers of 4 heads; a few heads starve the system turn."""
    share_LH = np.clip(rng.normal(share, 0.2, (4, 4)), 0.03, 0.97)
    image_LH = 0.6 * share_LH
    system_LH = 0.6 - image_LH
    ratio_LH = image_LH / system_LH
    ratio_LH[2, 1], share_LH[2, 1], system_LH[2, 1] = 40_000 * share, 0.999, 1e-5
    ratio_of_means = image_LH.mean() / system_LH.mean()
    summary = {
        "vas": float(ratio_LH.mean()),
        "vas_median": float(np.median(ratio_LH)),
        "ratio_of_means": float(ratio_of_means),
        "log_ratio": math.log(ratio_of_means),
        "image_share": float(share_LH.mean()),
        "image_mass": float(image_LH.mean()),
        "system_mass": float(system_LH.mean()),
        "num_samples": 240,
        "num_skipped": 0,
    }
    matrices = {"share": share_LH, "ratio": ratio_LH, "image": image_LH, "system": system_LH}
    return summary, {name: matrix.tolist() for name, matrix in matrices.items()}


@functools.cache
def grid_samples() -> list[tuple[str, photo_grid.Sample]]:
    """(base64 PNG, sample) of the six held-out questions."""
    out = []
    for sample in photo_grid.make_samples(6, 0, "test"):
        buffer = io.BytesIO()
        sample.image.save(buffer, "PNG")
        out.append((base64.b64encode(buffer.getvalue()).decode(), sample))
    return out


def fake_sample(stage: str, index: int, rng: np.random.Generator) -> dict:
    """One rollout: the base model babbles, the others answer, every third time wrongly."""
    image, sample = grid_samples()[index]
    if stage == "base":
        answer, response = None, "<answer>\x00 moon [56,\u00e9 tissue <script>alert(1)</script> " * 6
    else:
        answer = sample.answer if (index + len(stage)) % 3 else photo_grid.answers_of(sample.kind)[index % 3]
        response = sample.response.replace(f">{sample.answer}<", f">{answer}<")
    attention = rng.dirichlet(np.full(16, 0.6)).reshape(4, 4) * 0.6
    return {
        "image": image,
        "question": sample.question,
        "response": response,
        "answer": sample.answer,
        "predicted": answer,
        "correct": answer == sample.answer,
        "attention": None if answer is None else attention.tolist(),
        "answer_tokens": answer,
    }


def fake_stage(name: str) -> dict:
    rng = np.random.default_rng(list(TITLES).index(name))
    share = {"base": 0.5, "sft": 0.55, "agto": 0.75, "grpo": 0.75, "avar": 0.8}[name]
    measured = {query: fake_vas(share, rng) for query in ("user", "response")}
    return {
        "name": name,
        "title": TITLES[name],
        "seconds": {"base": 0.0, "sft": 251.3, "agto": 268.9, "grpo": 398.0, "avar": 402.0}[name],
        "accuracy": ACCURACY[name],
        "accuracy_biased": 0.9 - ACCURACY[name] / 10,
        "looks": ACCURACY[name] * 0.9,
        "n_eval": 240,
        "chance": 0.1,
        "vas": {query: summary for query, (summary, _) in measured.items()},
        "heatmap": {query: heatmap for query, (_, heatmap) in measured.items()},
        "samples": [fake_sample(name, index, rng) for index in range(6)],
        "guidance": GUIDANCE[name],
    }


def fake_sft_log(guided: bool) -> list[dict]:
    rng = np.random.default_rng(int(guided))
    records = []
    for step in range(1, 281):
        done = step / 280
        loss = 5.2 * math.exp(-7 * done) + 0.25 + 0.02 * rng.normal()
        image = 0.3 + guided * 0.2 * min(1.0, 3 * done) + 0.01 * rng.normal()
        system = 0.22 - guided * 0.08 * done + 0.01 * rng.normal()
        data = {
            "train/loss": loss + guided * 0.03,
            "train/lr": 2e-3 * (1 - done),
            "avar/lm_loss": loss,
            "avar/enhance": -math.log(image / 16),
            "avar/suppress": math.log(system / 20),
            "avar/image_mass": image,
            "avar/system_mass": system,
            "avar/image_share": image / (image + system),
            "avar/vas": math.exp(2 + 5 * done + 0.3 * rng.normal()),
        }
        records.append({"step": step, "data": data})
        if step % 70 == 0:
            records.append({"step": step, "data": {"val/loss": loss + 0.15}})
    return records


def fake_grpo_log() -> list[dict]:
    rng = np.random.default_rng(2)
    records = []
    for step in range(1, 25):
        accuracy, share = 0.45 + 0.006 * step + 0.04 * rng.normal(), 0.75 + 0.002 * step + 0.01 * rng.normal()
        data = {
            "avar/reward/acc": accuracy,
            "avar/reward/looks": accuracy * 0.9,
            "avar/dependency": 0.1 + 0.01 * step,
            "avar/r_visual/raw": share,
            "avar/r_visual/gated": accuracy * share,
            "avar/r_visual/weighted": 0.3 * accuracy * share,
            "avar/image_share": share,
            "avar/vas": 900 * share * math.exp(rng.normal()),
            "response_length/mean": 55 + rng.normal(),
            "training/rollout_actor_probs_pearson_corr": 0.9995 + 0.0002 * rng.normal(),
            "timing_s/step": 15 + rng.normal(),
        }
        records.append({"step": step, "data": data})
    return records


def build_run(folder: Path) -> Path:
    for name in ("stages", "logs"):
        (folder / name).mkdir(parents=True)
    for name in TITLES:
        (folder / "stages" / f"{name}.json").write_text(json.dumps(fake_stage(name)))
    logs = {"sft": fake_sft_log(False), "agto": fake_sft_log(True), "grpo": fake_grpo_log(), "avar": fake_grpo_log()}
    for name, records in logs.items():
        write_log(folder, name, records)
    settings = {"seed": 0, "sft_steps": 280, "sft_lr": 2e-3, "grpo_steps": 24, "agto": GUIDANCE["agto"]}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def write_log(folder: Path, name: str, records: list[dict]) -> None:
    (folder / "logs" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def edit_stage(run_dir: Path, name: str, edit) -> None:
    """Apply `edit(stage)` to a stage's file."""
    path = run_dir / "stages" / f"{name}.json"
    stage = json.loads(path.read_text())
    edit(stage)
    path.write_text(json.dumps(stage))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A run whose report has been written; not to be changed."""
    run_dir = build_run(tmp_path_factory.mktemp("report") / "demo")
    report.write_report(run_dir, 1234.5, VERSIONS)
    return run_dir


@pytest.fixture
def run_dir(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the run, without its report."""
    copy = tmp_path / "demo"
    shutil.copytree(pristine, copy, ignore=shutil.ignore_patterns("report.*"))
    return copy


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Skip the drawing, which takes nearly all of the time."""
    for module in (report, figures):
        monkeypatch.setattr(module, "svg", lambda figure, name, alt: report.Markup())


def page_text(run_dir: Path) -> str:
    """What a reader sees of report.html: without tags, styles and line breaks."""
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


class Tags(html.parser.HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(pristine: Path) -> str:
    return (pristine / "report.html").read_text(encoding="utf-8")


# ---- report.json -----------------------------------------------------------------------------------------------


def test_report_json_holds_the_numbers_of_the_stages(pristine):
    found = json.loads((pristine / "report.json").read_text())
    assert found["seconds"] == 1234.5
    assert found["versions"] == VERSIONS
    assert found["chance"] == 0.1
    assert [stage["name"] for stage in found["stages"]] == ["base", "sft", "agto", "grpo", "avar"]
    for stage in found["stages"]:
        measured = json.loads((pristine / "stages" / f"{stage['name']}.json").read_text())
        assert stage["vas_user"] == measured["vas"]["user"]["vas"]
        assert stage["vas_response"] == measured["vas"]["response"]["vas"]
        assert stage["image_share_response"] == measured["vas"]["response"]["image_share"]
        assert [stage[key] for key in report.SHARES] == [measured[key] for key in report.SHARES]
        assert stage["n_eval"] == 240


def test_infinite_vas_is_null_in_json_and_words_in_html(run_dir, no_figures):
    def edit(stage):
        stage["vas"]["response"].update(vas=float("inf"), ratio_of_means=float("inf"), log_ratio=float("inf"))
        stage["vas"]["user"]["vas"] = float("nan")

    edit_stage(run_dir, "agto", edit)
    returned = report.write_report(run_dir, 1.0, VERSIONS)
    text = (run_dir / "report.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == returned
    stage = found["stages"][2]
    assert stage["vas_response"] is None and stage["vas_user"] is None and stage["ratio_of_means_response"] is None
    seen = page_text(run_dir)
    assert "inf (a head's system mass underflowed)" in seen
    assert "not defined" in seen


def test_heat_map_says_what_is_not_finite(pristine):
    stages = report.read_stages(pristine)
    ratio, share = (stages[2]["heatmap"]["response"][key] for key in ("ratio", "share"))
    ratio[1][2], ratio[0][0], share[1][3] = math.inf, 0.0, math.nan
    figure = report.heatmap_figure(stages, "response")
    assert [figure.count(word) for word in (">inf<", ">-inf<", ">n/a<")] == [1, 1, 1]
    assert "mean image share: Base 0." in figure


def test_large_heat_map_has_no_numbers(pristine):
    stages = report.read_stages(pristine)[:1]
    stages[0]["heatmap"]["user"] = {"share": np.full((12, 8), 0.37).tolist(), "ratio": np.full((12, 8), 2.0).tolist()}
    assert ">0.37<" not in report.heatmap_figure(stages, "user")


# ---- report.png ------------------------------------------------------------------------------------------------


def test_picture_shows_a_question_that_the_last_stage_answers_and_few_others(pristine):
    stages = report.read_stages(pristine)
    figure = report.picture(stages)
    right = [index for index in range(6) if stages[-1]["samples"][index]["correct"]]
    counts = {index: sum(stage["samples"][index]["correct"] for stage in stages) for index in right}
    best = stages[0]["samples"][min(right, key=counts.get)]
    assert best["question"] in figure.texts[0].get_text()
    cells = [axes.get_title() for axes in figure.axes[2:]]
    assert cells[0] == "Base\nno answer" and cells[4].endswith(f"\u201c{best['answer']}\u201d")
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [100 * stage[key] for stage in stages for key in report.SHARES]
    assert (pristine / "report.png").stat().st_size > 10_000


# ---- report.html: whole ----------------------------------------------------------------------------------------


def test_every_section_is_there(page):
    ids = [attrs.get("id") for tag, attrs in Tags(page).found if tag == "section"]
    assert ids == list(SECTIONS)


def test_nothing_is_loaded_from_outside(page):
    tags = Tags(page).found
    links = [
        value for _, attrs in tags for key, value in attrs.items() if key in ("src", "href", "xlink:href", "srcset")
    ]
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "base"}
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", page))


def test_text_of_the_model_is_escaped(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;answer&gt;" in page and "<think>" not in page
    assert "\x00" not in page


def test_ids_are_unique(page):
    ids = [attrs["id"] for _, attrs in Tags(page).found if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_every_figure_has_a_text(page):
    tags = Tags(page).found
    assert all(attrs.get("alt") for tag, attrs in tags if tag == "img")
    labels = [attrs.get("aria-label") for tag, attrs in tags if tag == "svg"]
    assert len(labels) == 1 + len(report.COLD_START_PANELS) + len(report.GRPO_PANELS) + 2 and all(labels)


def test_the_source_names_the_licence_but_the_page_does_not_start_with_it(page):
    assert page.lstrip().startswith("<!DOCTYPE html>")


def test_size_is_bounded(page):
    assert len(page) < 3_000_000


# ---- report.html: parts ----------------------------------------------------------------------------------------


def test_summary_compares_each_stage_with_its_start_and_the_last_one_with_its_control(pristine):
    seen = page_text(pristine)
    start = "AGTO SFT answers 50.0 \u00b1 3.2 % right, clearly worse than Base"
    assert start not in seen and "AGTO SFT answers 50.0 \u00b1 3.2 % right, clearly better than Base" in seen
    assert "GRPO answers 12.5 \u00b1 2.1 % right, clearly worse than AGTO SFT (-37.5 points); 11 % of its" in seen
    assert "GRPO+VARS answers 54.2 \u00b1 3.2 % right, better than AGTO SFT, but not clearly so (+4.2 points)" in seen
    assert "GRPO+VARS is clearly better than GRPO (+41.7 points)." in seen


@pytest.mark.parametrize(
    ("accuracy", "before", "expected"),
    [
        (0.5, 0.5, "level with Before"),
        (0.9, 0.5, "clearly better than Before (+40.0 points)"),
        (0.52, 0.5, "better than Before, but not clearly so (+2.0 points)"),
        (0.1, 0.5, "clearly worse than Before (-40.0 points)"),
        (0.48, 0.5, "worse than Before, but not clearly so (-2.0 points)"),
        (1.0, 0.0, "clearly better than Before (+100.0 points)"),
    ],
)
def test_compare(accuracy, before, expected):
    stages = [{"title": title, "accuracy": p, "n_eval": 200} for title, p in (("Now", accuracy), ("Before", before))]
    assert report.compare(*stages) == expected


def test_standard_error_of_accuracy():
    assert report.standard_error(0.5, 100) == 0.05
    assert report.accuracy_text(0.2, 400) == "20.0\u00a0\u00b1\u00a02.0\u00a0%"


def test_table_names_the_start_of_every_stage(pristine):
    rows = report.stage_rows(report.read_stages(pristine))
    assert [row["starts_from"] for row in rows] == [
        *("random weights", "Base", "Base"),
        *("AGTO SFT", "AGTO SFT"),
    ]
    assert [part["query"] for part in rows[0]["parts"]] == ["response", "user"]
    assert rows[2]["accuracy"] == "50.0\u00a0\u00b1\u00a03.2\u00a0%"
    assert rows[4]["seconds"] == "6 min 42 s"


def test_skipped_samples_are_counted(pristine):
    stages = report.read_stages(pristine)
    assert report.skipped_note(stages) == ""
    stages[1]["vas"]["user"].update(num_skipped=3, num_samples=237)
    assert report.skipped_note(stages).endswith("have no VAS and are skipped: 3 of 240 (SFT, user tokens).")


def test_missing_answer_is_said(pristine):
    seen = page_text(pristine)
    assert "\u2717 wrong: no answer found" in seen
    assert "no answer, so no attention to show" in seen
    assert "\u2713 right: " in seen


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>A cat.</think><answer>cat</answer>", ("A cat.", "<answer>cat</answer>", "")),
        ("<think>A cat. A cat.", ("A cat. A cat.", "", "never closed")),
        ("cat", ("", "cat", "")),
        ("cat " * 50, ("cat " * 50, "", "no reasoning block")),
    ],
)
def test_split_response(response, expected):
    assert report.split_response(response) == expected


def test_settings_and_versions_are_shown(pristine):
    seen = page_text(pristine)
    assert "AGTO SFT image_target 0.4" in seen
    assert "GRPO+VARS statistic dependency" in seen
    assert "demo sft_steps 280" in seen
    assert "verl 0.9.1" in seen


def test_settings_file_is_optional(run_dir):
    (run_dir / "settings.json").unlink()
    rows = report.setting_rows(run_dir, report.read_stages(run_dir))
    assert ("AGTO SFT", "alpha", "0.02") in rows and not any(where == "demo" for where, _, _ in rows)


# ---- logs ------------------------------------------------------------------------------------------------------


def drop(records: list[dict], *keys: str) -> list[dict]:
    return [
        {"step": record["step"], "data": {key: value for key, value in record["data"].items() if key not in keys}}
        for record in records
    ]


def test_missing_curve_leaves_its_panel_out_and_says_so(run_dir, no_figures):
    write_log(run_dir, "avar", drop(fake_grpo_log(), "response_length/mean", "avar/r_visual/gated"))
    write_log(run_dir, "grpo", drop(fake_grpo_log(), "response_length/mean"))
    (run_dir / "logs" / "sft.jsonl").unlink()
    report.write_report(run_dir, 1.0, VERSIONS)
    seen = page_text(run_dir)
    assert "Response length: left out, no finite value of response_length/mean in logs/grpo.jsonl or " in seen
    assert "Tokens, mean over rollouts." not in seen
    assert "Visual reward: drawn without a curve, no finite value of avar/r_visual/gated in logs/avar.jsonl." in seen
    assert "logs/sft.jsonl does not exist." in seen
    assert "Time of a step." in seen


@pytest.mark.parametrize(("points", "num_drawn"), [([1.0, math.inf, 3.0], 1), ([math.inf, math.nan], 0)])
def test_values_that_are_not_finite_leave_a_gap_and_say_so(no_figures, points, num_drawn):
    panel = report.Panel("VAS", "About.", (report.Curve("avar", "avar/vas", "{avar}", "red"),))
    logs = {"avar": {"avar/vas": list(enumerate(points))}}
    drawn, notes = report.panels_with_notes([panel], logs, TITLES, "x")
    assert len(drawn) == num_drawn
    gap = "VAS: 1 of 3 values of avar/vas in logs/avar.jsonl are not finite and leave a gap."
    assert notes == [gap if num_drawn else "VAS: left out, no finite value of avar/vas in logs/avar.jsonl."]


def test_a_metric_may_be_absent_at_some_steps(run_dir):
    curves = report.read_log(run_dir / "logs" / "sft.jsonl", ["val/loss", "no/such"])
    assert [step for step, _ in curves["val/loss"]] == [70, 140, 210, 280]
    assert "no/such" not in curves


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 3, "da',
        "[1, 2]",
        '{"step": 3}',
        '{"step": "third", "data": {"avar/vas": 1.0}}',
        '{"step": 3, "data": {"avar/vas": [1.0]}}',
    ],
)
def test_unreadable_line_is_refused_with_its_number(run_dir, line):
    path = run_dir / "logs" / "avar.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(ValueError, match='avar.jsonl line 2 must be {"step": number, "data": {metric: number}}; got '):
        report.write_report(run_dir, 1.0, VERSIONS)
    assert not (run_dir / "report.json").exists()


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan, "12"])
def test_impossible_seconds_are_refused(run_dir, seconds):
    with pytest.raises(ValueError, match="seconds must be finite and not negative"):
        report.write_report(run_dir, seconds, VERSIONS)


def test_missing_stage_is_refused_by_name(run_dir):
    (run_dir / "stages" / "agto.json").unlink()
    with pytest.raises(ValueError, match=r"needs every stage .*agto\.json.*Run the demo to its end\."):
        report.write_report(run_dir, 1.0, VERSIONS)


def test_a_stage_of_another_version_is_refused(run_dir):
    edit_stage(run_dir, "sft", lambda stage: stage.pop("chance"))
    with pytest.raises(ValueError, match=r"must hold the fields .*none of \['chance'\]"):
        report.write_report(run_dir, 1.0, VERSIONS)
    assert not (run_dir / "report.json").exists()
