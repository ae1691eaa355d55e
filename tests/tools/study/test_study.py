# SPDX-License-Identifier: Apache-2.0
"""The study: advantages by hand, its cells, what a record says, intervals and verdicts, a kill in the middle.

That the loops train and measure as the engine does is tested with the engine (tests/plugin/engine).
"""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from avar_verl.model.checkpoint import Checkpoint
from avar_verl.tools.demo import lazy_task
from avar_verl.tools.runs import RECORDS, RecordFile, read_records
from avar_verl.tools.study import cells, claims, loops, report, work
from avar_verl.tools.study.cells import SUMMED, Cell, StudySettings
from avar_verl.tools.study.command import Run
from avar_verl.tools.study.run import _run

TINY = StudySettings(seeds=1, num_train=28, base_steps=2, cold_steps=2, grpo_steps=1, num_rl=16, num_eval=4)
THREE = [
    Cell(0, "base"),
    Cell(0, "cold", "agto", "mixture"),
    Cell(0, "grpo", "agto", "mixture", "dependency", SUMMED),
]


# ---- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        # 1.1 + 0.3 * (1, 0): mean 1.25, std 0.15 * sqrt(2).
        ("sum_then_normalize", [0.7071, -0.7071, 0.7071, -0.7071]),
        # An all-right group moves by lambda_v, the other one by its score too.
        ("normalize_then_sum", [0.2121, -0.2121, 0.9192, -0.9192]),
        ("no_std", [0.15, -0.15, 0.65, -0.65]),
    ],
)
def test_advantages_by_hand(normalization, expected):
    score_B, visual_B = torch.tensor([1.1, 1.1, 1.1, 0.1]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    settings = loops.Grpo(normalization=normalization, visual="dependency")
    found_B = loops.advantages(score_B, visual_B, torch.tensor([0, 0, 1, 1]), settings)
    torch.testing.assert_close(found_B, torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("visual", [None, *loops.VISUAL])
def test_every_reward_moves_the_language_model_and_nothing_else(tiny_model_path, visual):
    checkpoint = Checkpoint.load(tiny_model_path)
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    samples = lazy_task.make_questions(2, 0, 1.0, "train")
    settings = loops.Grpo(steps=1, prompts=2, rollouts=2, visual=visual, max_new_tokens=6, normalization="no_std")
    (step,) = loops.grpo(checkpoint, samples, settings, seed=0)
    assert step["tokens"] > 0 and 0 <= step["accuracy"] <= 1
    moved = {name for name, value in checkpoint.model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any("visual" in name for name in moved)


def test_a_cold_start_learns_and_guidance_raises_the_image_mass(tiny_model_path):
    masses = []
    for alpha in (0.0, 1.0):
        checkpoint = Checkpoint.load(tiny_model_path)
        rows = lazy_task.make_chains(28, 0, lazy_task.Mixture())
        chains = [loops.chain_of(checkpoint, row) for row in rows]
        settings = loops.ColdStart(steps=8, batch_size=14, lr=2e-3, alpha=alpha, image_target=None)
        losses = list(loops.cold_start(checkpoint, chains, settings, seed=0))
        assert losses[-1] < losses[0]
        fields_BF, _ = loops.measured(checkpoint, loops.batch_of(checkpoint, chains[:4]))
        masses.append(float(fields_BF[:, 2].mean()))
    assert masses[1] > masses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"visual": "vas"}, "visual must be one of"), ({"normalization": "std"}, "normalization must be one of")],
)
def test_unknown_rewards_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        loops.Grpo(**settings)


def test_answers_are_graded_and_their_habit_is_told(tiny_model_path):
    checkpoint = Checkpoint.load(tiny_model_path)
    samples = lazy_task.make_questions(3, 0, 1.0, "test")
    prompts = [loops.prompt_of(checkpoint, sample) for sample in samples]
    found = loops.answer(checkpoint, samples, prompts, 5)
    assert [len(part) for part in (found.texts, found.correct_B, found.looks_B)] == [3, 3, 3]
    response_S = found.batch.response_BS[0]
    assert int(response_S.sum()) == 5 and not bool(response_S[: len(prompts[0].ids_S)].any())
    greedy = checkpoint.processor.tokenizer.decode(
        found.batch.inputs["input_ids"][0][response_S], skip_special_tokens=True
    )
    assert greedy == found.texts[0]


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_every_cell_starts_from_one_before_it():
    found = cells.main_cells(StudySettings())
    assert len(found) == len({cell.name for cell in found}) == 5 * (1 + 7 + 12)
    for at, cell in enumerate(found):
        assert cell.start is None or cell.start in found[:at]
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found)


def test_other_normalizations_are_of_the_two_best_rewards():
    records = {}
    for at, reward in enumerate(cells.REWARDS):
        records[reward] = {"reward": reward, "normalization": SUMMED, "accuracy": at / 10}
    records["cold"] = {"reward": None, "normalization": None, "accuracy": 1.0}
    assert cells.best_rewards(records) == ["visual_anchor", "dependency"]
    further = cells.further_cells(StudySettings(seeds=2), records)
    assert len(further) == 2 * 2 * 2 * 2
    assert {cell.normalization for cell in further} == set(cells.OTHERS) <= set(loops.NORMALIZATIONS)
    assert {cell.reward for cell in further} == {"visual_anchor", "dependency"}


@pytest.mark.e2e
def test_a_killed_study_goes_on_and_repeats_nothing(tmp_path):
    """Killed while its second run trains."""
    code = (
        "from pathlib import Path; from tests.tools.study.test_study import study_of_three\n"
        f"if __name__ == '__main__': study_of_three(Path({str(tmp_path)!r}))"
    )
    script = tmp_path / "go.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=Path.cwd(), env=_environment(), start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "out" / RECORDS).exists() or not (tmp_path / "out" / RECORDS).read_bytes():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    import os

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = (tmp_path / "out" / RECORDS).read_bytes()
    study_of_three(tmp_path)
    after = (tmp_path / "out" / RECORDS).read_bytes()
    assert after.startswith(before)
    records = read_records(tmp_path / "out" / RECORDS, "name")
    assert list(records) == [cell.name for cell in THREE]
    grpo = records[THREE[2].name]
    assert len(grpo["curve"]) == 1 and grpo["n_eval"] == 4 and 0 <= grpo["accuracy"] <= 1
    assert set(records[THREE[1].name]["interventions"]) == set(cells.INTERVENTIONS)
    with pytest.raises(ValueError, match="other settings"):
        RecordFile(tmp_path / "out" / RECORDS, "name", asdict(replace(TINY, seeds=2)))


def study_of_three(folder: Path) -> None:
    """The three cells that depend on each other, in `folder/out`."""
    out = folder / "out"
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    with RecordFile(out / RECORDS, "name", asdict(TINY)) as file:
        _run(THREE, file, out, TINY, workers=1)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}"}


# ---- claims ----------------------------------------------------------------------------------------------------------


def record(cell: Cell, accuracy: float, share: float) -> dict:
    """A made-up record: VAS and dependency go with the image share."""
    masses = {"image_mass": share / 2, "system_mass": (1 - share) / 2, "image_share": share}
    values = {f"{key}_{query}": value for key, value in masses.items() for query in ("user", "response")}
    out = {"name": cell.name, **asdict(cell), **values, "accuracy": accuracy, "accuracy_biased": 0.9, "looks": accuracy}
    out |= {"vas_user": 10 ** (4 * share), "vas_response": 10 ** (5 * share), "dependency": share, "n_eval": 280}
    if cell.stage == "cold":
        out["interventions"] = {spec: accuracy + 0.1 * at for at, spec in enumerate(cells.INTERVENTIONS)}
    return out


def made_up(seeds: int = 3) -> list[dict]:
    """Dependency wins by 50 and 52 points and accuracy alone loses; the text-only cold start has the highest VAS."""
    out = []
    for cell in cells.main_cells(StudySettings(seeds=seeds)):
        accuracy = 0.2 + 0.01 * cell.seed
        if cell.reward == "dependency":
            accuracy += 0.5 + 0.02 * (cell.seed % 2)
        share = {"base": 0.3, "cold": 0.4}.get(cell.stage, 0.3 + accuracy / 2)
        out.append(record(cell, accuracy, 0.6 if cell.chains == "text" else share))
    return out


def test_an_interval_by_hand():
    """Mean 2, standard deviation 1, t of 2 degrees of freedom 4.3027."""
    found = claims.Estimate.of([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high - 2 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)
    assert (found.sign, claims.Estimate.of([2.0, 2.1, 2.2]).sign, claims.Estimate.of([-2.0, -2.1]).sign) == (
        "0",
        "+",
        "-",
    )
    assert math.isnan(claims.Estimate.of([1.0]).low) and claims.Estimate.of([]).n == 0
    assert claims.estimate_text(claims.Estimate.of([]), 100) == "none"


def test_claims_follow_the_numbers():
    runs = claims.Runs(made_up())
    found = {
        (one.letter, one.text.split()[2] if one.letter == "e" else ""): one
        for one in claims.claims(runs, claims.correlations(runs, report.Bootstrap()))
    }
    assert found["b", ""].verdict == "holds"  # text-only has the higher VAS
    assert found["c", ""].verdict == "in part"  # the first intervention changes nothing, the second 10 points
    assert found["d", ""].verdict == "not shown"
    assert found["e", "dependency"].verdict == "holds" and "+50.7" in found["e", "dependency"].measured
    assert found["e", "image_share"].verdict == "not shown"


@pytest.mark.parametrize(
    ("signs", "verdict"),
    [
        ("++", "holds"),
        ("+0", "in part"),
        ("+-", "depends"),
        ("--", "the opposite"),
        ("0-", "not shown"),
        ("0", "not shown"),
    ],
)
def test_verdicts(signs, verdict):
    assert claims._verdict(signs) == verdict


def test_differences_are_paired_by_seed():
    runs = claims.Runs(made_up())
    change = runs.difference("accuracy", claims.rl("plain", "dependency"), claims.rl("plain", "accuracy"))
    assert change.n == 3 and change.mean == pytest.approx((0.5 + 0.52 + 0.5) / 3)
    missing = claims.Runs([one for one in made_up() if one["seed"] != 1 or one["reward"] != "accuracy"])
    assert missing.difference("accuracy", claims.rl("plain", "dependency"), claims.rl("plain", "accuracy")).n == 2


def test_the_report_of_a_study_that_is_not_finished(tmp_path, capsys):
    lines = "".join(json.dumps(one) + "\n" for one in made_up(2)[:14])
    (tmp_path / RECORDS).write_text(lines)
    report.write_report(tmp_path)
    assert "GRPO from the mixtures" in capsys.readouterr().out
    text = (tmp_path / "tables.md").read_text()
    assert "| plain | dependency | sum_then_normalize | 1 | 70.0 | 70 to 70 |" in text
    assert "http" not in (tmp_path / "report.html").read_text().replace("http://www.w3.org", "")
    assert (tmp_path / "rewards.png").stat().st_size > 5_000 < (tmp_path / "scatter.png").stat().st_size
    (tmp_path / RECORDS).write_text(lines.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="at least three trained checkpoints; got 0"):
        report.write_report(tmp_path)


def test_unknown_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"settings must be some of \[.*got \['steps'\]"):
        Run(out=tmp_path, settings={"steps": 3}).run()


def test_masses_and_dependency_are_measured_on_own_responses(tiny_model_path, monkeypatch):
    monkeypatch.setattr(work, "BATCH", 2)
    found = work.measure(Checkpoint.load(tiny_model_path), seed=0, num=3)
    names = {f"{name}_{query}" for name in work.MEASURED for query in ("user", "response")} | {"dependency"}
    assert names <= found.keys() and all(math.isfinite(found[name]) for name in names)
    assert sum(part["n"] for part in found["by_habit"].values()) == 3
