# SPDX-License-Identifier: Apache-2.0
"""Families from outside: the package of docs/new-model.md, installed, and what is refused."""

import sys

import pytest

from avar_verl.model import families
from avar_verl.tools.doctor.run import run_checks
from tests.model.families.outside import install_package, write_package

FAMILY = "from avar_verl.model.families.{0} import FAMILY\n"


@pytest.fixture
def fresh(monkeypatch):
    """`fresh(folder, AVAR_FAMILY)`: a process in which the folder is on the path, until the test ends."""

    def start(folder, variable: str = "") -> None:
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        monkeypatch.setenv(families.VARIABLE, variable)
        families._outside.cache_clear()

    before = set(sys.modules)
    yield start
    for name in set(sys.modules) - before:
        if name.startswith("avar_llava") or name.startswith("other_"):
            del sys.modules[name]
    families._outside.cache_clear()


def entry(site, name: str, value: str, package: str = "other") -> None:
    """An installed package with one entry point."""
    info = site / f"{package}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{families.GROUP}]\n{name} = {value}\n")


@pytest.mark.e2e
def test_the_package_of_the_page_makes_a_known_family(tmp_path, family_path, fresh):
    assert "llava" not in families.FAMILIES, "choose a family for the page that is not shipped"
    with pytest.raises(ValueError, match="needs a known model family; got model_type='llava'"):
        families.get_family("llava")
    fresh(install_package(tmp_path))
    assert families.get_family("llava").model_types == ("llava",) and "llava" in families.known_families()
    results = run_checks(family_path("llava"))
    failed = [f"{result.name}: {result.detail}" for result in results if result.status == "fail"]
    assert not failed
    passed = {result.name for result in results if result.status == "pass"}
    assert {"family", "processor", "roles", "masses", "guidance", "freezing"} <= passed


def test_a_module_without_an_entry_point_is_named(tmp_path, fresh):
    fresh(write_package(tmp_path), "avar_llava:FAMILY")
    assert families.get_family("llava").model_types == ("llava",)
    with pytest.raises(ValueError, match=r"that of the model; got 'avar_llava:FAMILY' for .*'llava'.* 'qwen2_vl'"):
        families.get_family("qwen2_vl")


def test_a_named_family_replaces_a_shipped_one(tmp_path, fresh):
    (tmp_path / "other_qwen.py").write_text(
        "import dataclasses\n" + FAMILY.format("qwen2_vl") + "FAMILY = dataclasses.replace(FAMILY, system='mine')\n"
    )
    fresh(tmp_path, "other_qwen:FAMILY")
    assert families.get_family("qwen2_vl").system == "mine"


@pytest.mark.parametrize(
    "path, message",
    [
        ("other_missing:FAMILY", "No module named 'other_missing'"),
        ("other_empty:FAMILY", "has no attribute 'FAMILY'"),
        ("other_empty", "has no attribute ''"),
        (":FAMILY", "got ':FAMILY'"),
        ("other_empty:__name__", "which is str. End the module in FAMILY"),
    ],
)
def test_what_is_no_family_is_refused_before_the_run(tmp_path, fresh, path, message):
    (tmp_path / "other_empty.py").write_text("")
    fresh(tmp_path)
    with pytest.raises(ValueError, match=rf"avar.family \(AVAR_FAMILY\) must name .*{message}"):
        families.choose_family(path)


def test_nothing_is_chosen_by_an_empty_name(tmp_path, fresh):
    fresh(tmp_path)
    families.choose_family("")
    assert families.load_outside() == {}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("qwen2_vl", "avar_llava:FAMILY", "one family; got 'qwen2_vl' in 'avar_llava:FAMILY' and in 'avar_verl'"),
        ("lava", "avar_llava:FAMILY", r"named by a model_type of its family; got 'lava' for \('llava',\)"),
        ("llava", "other_gone:FAMILY", "the entry point 'llava' of avar_verl.families must name .*other_gone"),
    ],
)
def test_entry_points_that_are_wrong_are_refused(tmp_path, fresh, name, value, message):
    write_package(tmp_path)
    entry(tmp_path, name, value)
    fresh(tmp_path)
    with pytest.raises(ValueError, match=message):
        families.get_family("qwen2_5_vl")


def test_two_packages_for_one_model_type_are_refused(tmp_path, fresh):
    write_package(tmp_path)
    (tmp_path / "other_llava.py").write_text("from avar_llava import FAMILY\n")
    entry(tmp_path, "llava", "avar_llava:FAMILY")
    entry(tmp_path, "llava", "other_llava:FAMILY", "another")
    fresh(tmp_path)
    with pytest.raises(ValueError, match="must have one family; got 'llava' in"):
        families.load_outside()
