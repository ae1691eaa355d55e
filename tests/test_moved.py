# SPDX-License-Identifier: Apache-2.0
"""Old names of modules are the new modules, and say so."""

import importlib
import re
import subprocess
import sys

import pytest
from hydra.utils import get_class
from verl.utils.import_utils import load_extern_object

import avar_verl
from avar_verl import moved

# Every module that has moved, by its old package.
OLD = {
    "": (
        "cli compat config demo doctor engine engine_config evaluation families figures freeze measure "
        "regions register render rollout synth trainer vas vllm_plugin"
    ),
    "compat": (
        "cpu_flash cpu_platform detect fsdp2_targets glm4v metrics packed_attention position_ids "
        "process_group processor rollout_features text_only vllm_cpu weight_names"
    ),
    "data": "check_rendered region_dataset sft_dataset table",
    "demo": "dataset photo_grid report run tiny_model",
    "doctor": "check checks run samples subject vllm_worker",
    "doctor.checks": "attention data images loading memory prompts rewards rollout",
    "engine": "fsdp inputs",
    "evaluation": "benchmarks client command dry_run grade intervene items records run server statistics tables",
    "families": (
        "family gemma3 glm4v grid idefics3 internvl llava_next llava_onevision mllama qwen2_5_vl qwen2_vl "
        "qwen3_vl turns"
    ),
    "intervention": "answers command sweep",
    "objectives": "reward",
    "rewards": "offline",
    "rollout": "agent_loop reward_manager",
    "synth": ("card chain client config duplicates estimate gates items output pipeline prompts store"),
    "trainer": "grpo",
    "vas": "compare compare_report figures records report rows run score show statistics words work",
}
NAMES = [
    ".".join(filter(None, ("avar_verl", package, name))) for package, names in OLD.items() for name in names.split()
]


@pytest.fixture(autouse=True)
def forget():
    """Old names that have been imported before would not warn again."""
    for name in [name for name in sys.modules if name.startswith("avar_verl.") and moved.new_name(name)]:
        del sys.modules[name]
        vars(avar_verl).pop(name.removeprefix("avar_verl."), None)


@pytest.mark.parametrize("old", NAMES)
def test_an_old_name_is_the_new_module(old):
    new = moved.new_name(old)
    with pytest.warns(FutureWarning, match=re.escape(f"{old} is now {new};")) as caught:
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert module.__name__ == module.__spec__.name == new
    count = len(caught)
    importlib.import_module(old)
    assert len(caught) == count, "once by name"


def test_modules_of_a_moved_package_by_from():
    with pytest.warns(FutureWarning):
        from avar_verl.compat import detect
        from avar_verl.families import turns
        from avar_verl.trainer import grpo
    from avar_verl.model import turns as new_turns
    from avar_verl.plugin.compat.cpu import detect as new_detect
    from avar_verl.plugin.trainer import ppo

    assert detect is new_detect and turns is new_turns and grpo is ppo


def test_a_renamed_class():
    from avar_verl.plugin.config import RewardManagerConfig

    with pytest.warns(FutureWarning, match="RewardConfig is now avar_verl.plugin.config.RewardManagerConfig"):
        assert get_class("avar_verl.config.RewardConfig") is RewardManagerConfig


def test_configs_of_users():
    from avar_verl.plugin.datasets.sft import AvarSFTDataset
    from avar_verl.plugin.engine.config import AvarFSDPEngineConfig

    with pytest.warns(FutureWarning, match="avar_verl.engine_config is now avar_verl.plugin.engine.config"):
        assert get_class("avar_verl.engine_config.AvarFSDPEngineConfig") is AvarFSDPEngineConfig
    with pytest.warns(FutureWarning, match="avar_verl.data.sft_dataset is now avar_verl.plugin.datasets.sft"):
        assert load_extern_object("pkg://avar_verl.data.sft_dataset", "AvarSFTDataset") is AvarSFTDataset


def test_nothing_else_is_found():
    for name in ("avar_verl.nothing", "avar_verl.vas.nothing", "avar_verl.data.nothing"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_the_old_command_and_a_light_import():
    command = [sys.executable, "-m", "avar_verl.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: avar" in done.stdout
    assert "avar_verl.cli is now avar_verl.tools.cli" in done.stderr, "a FutureWarning is shown by default"
    code = "import sys, avar_verl; assert not {'torch', 'transformers', 'verl', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert avar_verl.__version__
