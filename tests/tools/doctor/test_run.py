# SPDX-License-Identifier: Apache-2.0
"""The suite as a whole: every family passes, a failure stops only what needs it, and the command reports all of it."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from avar_verl.model.families import FAMILIES
from avar_verl.tools import cli
from avar_verl.tools.doctor import run as doctor
from avar_verl.tools.doctor.check import CHECKS, STATUSES, Check, Finding, Result, Skip, check
from avar_verl.tools.doctor.run import run_checks

NAMES = [check.name for check in CHECKS]
# What a family cannot do with the installed versions.
KNOWN_FAILURES = {
    "mllama": {"architecture"},  # vLLM 0.24.0 has no cross-attention models.
    "mistral3": {"image sizes"},  # An image of one token loses its first dimension in transformers 5.9.
}


@pytest.mark.e2e
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_passes(family_path, model_type):
    pytest.importorskip("vllm")
    results = {result.name: result for result in run_checks(family_path(model_type))}
    assert list(results) == NAMES
    failed = {name for name, result in results.items() if result.status == "fail"}
    assert failed == KNOWN_FAILURES.get(model_type, set()), [results[name].detail for name in failed]
    assert float(re.search(r"difference\| (\S+) from", results["masses"].detail)[1]) < 1e-5
    skipped = {name: result.detail for name, result in results.items() if result.status == "skip"}
    reasons = {
        "data": "no --data FILE",
        "rollout": "no --rollout",
        "boxes": f"{model_type} was trained on no box format",
    }
    for name, reason in skipped.items():
        assert reason == reasons[name] or name == "rollout" and "architecture" in failed


@pytest.mark.e2e
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3", "mllama", "qwen3_vl_moe"])
def test_a_large_model_is_examined_reduced(family_path, model_type):
    names = ["weights", "images", "masses", "guidance", "freezing"]
    results = {result.name: result for result in run_checks(family_path(model_type), only=names, large=1000)}
    assert "float32 model of this config with 2 text layers and random weights" in results["weights"].detail
    for name in names:
        assert results[name].status in ("pass", "warn"), results[name]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3"])
def test_rollout_of_a_real_engine(family_path, model_type):
    pytest.importorskip("vllm")
    *_, result = run_checks(family_path(model_type), only=["rollout"], rollout=True)
    assert result.status in ("pass", "warn") and "3 prompts have the same ids" in result.detail, result


# ---- the machinery ---------------------------------------------------------------------------------------------


def make(name: str, needs: tuple[str, ...] = (), does=None) -> Check:
    def function(subject):
        if isinstance(does, BaseException):
            raise does
        return does or "fine"

    return Check(name, "a failure", "fix it", needs, function)


@pytest.fixture
def checks(monkeypatch):
    """Four checks: one fails, one needs it, one needs that, one does not."""
    error = KeyError("patch_size")
    made = [make("a", (), error), make("b", ("a",)), make("c", ("b",)), make("d", (), Finding("so so", "change it"))]
    monkeypatch.setattr(doctor, "CHECKS", [*made, make("e", (), Skip("not here"))])


def test_a_failure_stops_only_what_needs_it(checks):
    seen = []
    results = run_checks("nowhere", on_result=seen.append)
    assert [(result.name, result.status, result.detail) for result in results] == [
        ("a", "fail", "KeyError: 'patch_size'"),
        ("b", "skip", "needs a"),
        ("c", "skip", "needs b"),
        ("d", "warn", "so so"),
        ("e", "skip", "not here"),
    ]
    assert seen == results and all(result.status in STATUSES for result in results)
    assert [result.fix for result in results[2:4]] == ["fix it", "change it"]


def test_some_checks_bring_what_they_need(checks):
    assert [result.name for result in run_checks("nowhere", only=["c"])] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="checks are a, b, c, d, e; got 'f'"):
        run_checks("nowhere", only=["f"])


class Bug(Exception):
    """None of FOREIGN_ERRORS."""


def test_an_error_of_ours_is_not_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", [make("a", (), Bug())])
    with pytest.raises(Bug):
        run_checks("nowhere")


@pytest.mark.parametrize(("name", "needs"), [("family", []), ("new", ["later"])])
def test_a_check_needs_a_name_of_its_own_and_checks_before_it(name, needs):
    with pytest.raises(ValueError, match="a check needs a unique name, and only checks registered earlier"):
        check(name, prevents="", fix="", needs=needs)(lambda subject: "")
    assert [check.name for check in CHECKS] == NAMES


def test_the_page_lists_every_check():
    page = (Path(__file__).parents[3] / "docs" / "doctor.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert rows[1:] == [f"| {check.name} | {check.prevents} | {check.fix} |" for check in CHECKS]


# ---- the command -----------------------------------------------------------------------------------------------


def report(results: list[Result]) -> str:
    console = Console(width=100, file=io.StringIO())
    doctor.print_report(results, console)
    return console.file.getvalue()


def test_the_report_says_how_to_fix_every_failure(checks, tmp_path):
    text = report(run_checks("nowhere"))
    assert "fail: a\na failure\n-> fix it\n" in text
    assert "warn: d\nchange it\n" in text
    assert text.rstrip().endswith("0 pass, 1 warn, 1 fail, 3 skip")


def test_tables_of_a_check_are_printed(tiny_model_path):
    text = report(run_checks(tiny_model_path, only=["memory"], gpus=4))
    assert "0.893 million: text 0.636 million, vision 0.257 million" in text
    assert "3.83 MiB a GPU on 4: 18 bytes a parameter" in text


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(*arguments)` -> (exit code, what was printed) of `avar doctor`, in this process."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["avar", "doctor", *arguments])
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            cli.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def test_the_command_writes_json_and_fails_with_a_check(command, folder, tmp_path):
    out = tmp_path / "report.json"
    code, printed = command("--model", str(folder), "--only", "family", "boxes", "--out", str(out))
    assert code == 0 and "2 pass, 0 warn, 0 fail, 0 skip" in printed
    content = json.loads(out.read_text())
    assert content["subject"]["model"] == str(folder) and content["versions"]["verl"] == "0.9.1"
    assert [result["status"] for result in content["results"]] == ["pass", "pass"]
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"image_token_id": ', '"image_token_id": 1'))
    code, printed = command("--model", str(folder), "--only", "vocabulary")
    assert code == 1
    assert "fail: vocabulary\nImage tokens with an id that the config does not know" in printed
