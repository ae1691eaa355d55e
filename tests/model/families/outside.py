# SPDX-License-Identifier: Apache-2.0
"""The package of docs/new-model.md, built and installed."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "new-model.md"


def write_package(folder: Path) -> Path:
    """The files of the page."""
    page = PAGE.read_text()
    [project], [module] = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("toml", "python"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(project)
    (folder / "avar_llava.py").write_text(module)
    return folder


def install_package(work: Path) -> Path:
    """The folder into which the package's wheel was unpacked, which is all that an installer does with a pure one."""
    source, site = write_package(work / "source"), work / "site"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(work)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    [wheel] = work.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site
