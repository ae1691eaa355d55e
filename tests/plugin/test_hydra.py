# SPDX-License-Identifier: Apache-2.0
"""Hydra finds the recipe by name, after everything else."""

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.utils import create_config_search_path
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from avar_verl.plugin.hydra import CONFIGS, AvarSearchPath, register


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
