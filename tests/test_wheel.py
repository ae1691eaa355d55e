# SPDX-License-Identifier: Apache-2.0
"""The wheel: its contents, and the recipe run from it, away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import avar_verl

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[1]
PACKAGES = ("avar_verl", "recipes", "reward_fns")
# Stand for the two programs that the scripts start: the trainer, in a Python that knows the wheel and no checkout.
PROGRAMS = {
    "python": 'exec "$PYTHON" -S "$@"',
    "torchrun": 'while [[ $1 != -m ]]; do shift; done; exec "$PYTHON" -S "$@"',
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=ROOT, check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`installed(*command)` -> what the command prints in an empty folder, with the wheel's files on its path.

    -S: no .pth file is read, and with it no editable install of the checkout.
    """
    site, programs, empty = (tmp_path_factory.mktemp(name) for name in ("site", "programs", "empty"))
    zipfile.ZipFile(wheel).extractall(site)
    for name, line in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{site}:{sysconfig.get_path('purelib')}",
        "HOME": os.environ["HOME"],
        "HF_HUB_OFFLINE": "1",
    }

    def run(*command: str, **variables: str) -> str:
        done = subprocess.run(command, cwd=empty, env=environment | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
        return done.stdout.strip()

    run.site = site
    return run


def test_the_wheel_holds_every_file_of_its_packages_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert names == {name for name in tracked if (ROOT / name).exists()}
    assert {"avar_verl/py.typed", "recipes/avar/run_sft_qwen2_5_vl_7b.sh", "recipes/avar/synth/api.yaml"} <= names


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_string(archive.read(path).decode())
    assert metadata["Version"] == avar_verl.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata.get_all("Project-URL")
    heavy = ("torch", "verl", "vllm", "transformers", "ray", "flash")
    plain = [name for name in metadata.get_all("Requires-Dist") if "extra ==" not in name]
    assert plain and not [name for name in plain if name.startswith(heavy)]


def test_modules_come_from_the_wheel(installed):
    code = "import avar_verl, recipes, reward_fns; print(avar_verl.__file__, recipes.__file__, reward_fns.__file__)"
    paths = installed("python", "-c", code).split()
    assert paths == [str(installed.site / name / "__init__.py") for name in PACKAGES]


def test_the_folder_of_the_recipe_is_printed(installed):
    assert installed("python", "-m", "recipes.avar") == str(installed.site / "recipes" / "avar")


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        (
            "run_sft_qwen2_5_vl_7b.sh",
            {"TRAIN": "a.parquet"},
            {"engine._target_": "avar_verl.plugin.engine.config.AvarFSDPEngineConfig", "trainer.device": "cpu"},
        ),
        (
            "run_grpo_qwen2_5_vl_7b.sh",
            {"MODEL": "folder"},
            {"trainer.v1.trainer_mode": "avar_sync", "reward.custom_reward_function.path": "pkg://reward_fns.avar"},
        ),
    ],
)
def test_scripts_compose_by_name(installed, script, variables, expected):
    """Both launchers find the recipe's configs and verl's: no --config-dir, no checkout, an empty folder."""
    machine = "machine=cpu_sft" if "sft" in script else "machine=cpu_grpo"
    folder = installed.site / "recipes" / "avar"
    config = OmegaConf.create(installed("bash", str(folder / script), machine, "--cfg", "job", **variables))
    assert {key: OmegaConf.select(config, key) for key in expected} == expected
    assert config.trainer.n_gpus_per_node == 8 and config.avar.agto.alpha == 0.15
