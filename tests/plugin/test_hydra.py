# SPDX-License-Identifier: Apache-2.0
"""Hydra finds the recipe by name, after everything else."""

import os
import sys

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.utils import create_config_search_path
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from avar_verl.model import families
from avar_verl.plugin import hydra as plugin_hydra
from avar_verl.plugin.hydra import CONFIGS, AvarSearchPath, SwitchOn, register


@pytest.fixture
def without(monkeypatch):
    """`without()` takes the plugin out, until the test ends."""

    def remove():
        known = Plugins.instance().plugin_type_to_subclass_list
        monkeypatch.setitem(known, SearchPathPlugin, [p for p in known[SearchPathPlugin] if p is not AvarSearchPath])

    return remove


def test_import_verl_registers_it_once():
    import verl  # noqa: F401  Its entry points are read.

    register(None)
    assert Plugins.instance().discover(SearchPathPlugin).count(AvarSearchPath) == 1


def test_it_comes_after_the_launchers_own_folder():
    paths = [element.path for element in create_config_search_path("pkg://verl.trainer.config").get_path()]
    assert paths == ["pkg://hydra.conf", "pkg://verl.trainer.config", CONFIGS, "structured://"]


@pytest.mark.parametrize("name", ["ppo_trainer", "sft_trainer_engine"])
def test_a_run_of_verl_alone_composes_what_it_composed_before(without, name):
    def composed():
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose(name)

    register(None)
    found = composed()
    without()
    assert composed() == found


def test_the_chosen_family_is_that_of_every_process(monkeypatch, tmp_path):
    """Of this one and of those that it starts, Ray's workers among them, by the environment."""
    (tmp_path / "other_hydra.py").write_text("from avar_verl.model.families.qwen2_vl import FAMILY\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv(families.VARIABLE, "")
    with initialize_config_module("recipes.avar.config", version_base=None):
        config = compose("avar_grpo", overrides=["avar.family=other_hydra:FAMILY"], return_hydra_config=True)
        wrong = compose("avar_grpo", overrides=["avar.family=other_hydra:NONE"], return_hydra_config=True)
    with pytest.raises(SystemExit, match="has no attribute 'NONE'"):
        SwitchOn().on_job_start(wrong, task_function=compose)
    monkeypatch.setattr(plugin_hydra, "switch_on", lambda: None)
    monkeypatch.setattr("avar_verl.plugin.refusals.check_run", lambda *args: None)
    SwitchOn().on_job_start(config, task_function=compose)
    assert os.environ[families.VARIABLE] == "other_hydra:FAMILY"
    families._outside.cache_clear()
