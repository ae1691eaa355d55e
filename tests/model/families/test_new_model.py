# SPDX-License-Identifier: Apache-2.0
"""docs/new-model.md, executed: its family, its registry line, its tiny model, its call of the doctor."""

import re
import sys
import types
from pathlib import Path

import pytest

from avar_verl.model import families
from avar_verl.tools.doctor.run import run_checks
from tests.model.families import tiny

PAGE = Path(__file__).parents[3] / "docs" / "new-model.md"


@pytest.fixture
def blocks() -> tuple[str, str, str]:
    return tuple(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.mark.e2e
def test_the_worked_example(blocks, monkeypatch, tmp_path):
    family_file, registry_line, tiny_spec = blocks
    assert "llava" not in families.FAMILIES, "choose a family for the page that is not shipped"
    module = types.ModuleType("avar_verl.model.families.llava")
    exec(family_file, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(families.FAMILIES, "llava", "")  # Removed again after the test.
    exec(registry_line, {"FAMILIES": families.FAMILIES})
    assert families.get_family("llava").model_types == ("llava",)
    monkeypatch.setattr(tiny, "SPECS", dict(tiny.SPECS))
    exec(tiny_spec, vars(tiny))
    monkeypatch.delattr(tiny, "LLAVA")
    results = run_checks(tiny.build_tiny("llava", tmp_path / "llava"))
    failed = [f"{result.name}: {result.detail}" for result in results if result.status == "fail"]
    assert not failed
    passed = {result.name for result in results if result.status == "pass"}
    assert {"family", "processor", "roles", "masses", "guidance", "freezing"} <= passed
