# SPDX-License-Identifier: Apache-2.0
"""Old names of modules, which configs and scripts may hold: they import, with a warning, and are the new modules."""

import importlib
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

# Old module -> new module. A package includes its modules, except those with their own line.
MOVED = {
    "avar_verl.cli": "avar_verl.tools.cli",
    "avar_verl.compat": "avar_verl.plugin.compat",
    "avar_verl.compat.cpu_flash": "avar_verl.plugin.compat.cpu.flash",
    "avar_verl.compat.cpu_platform": "avar_verl.plugin.compat.cpu.platform",
    "avar_verl.compat.detect": "avar_verl.plugin.compat.cpu.detect",
    "avar_verl.compat.process_group": "avar_verl.plugin.compat.cpu.process_group",
    "avar_verl.compat.vllm_cpu": "avar_verl.plugin.compat.cpu.vllm",
    "avar_verl.compat.fsdp2_targets": "avar_verl.plugin.compat.verl.fsdp2_targets",
    "avar_verl.compat.glm4v": "avar_verl.plugin.compat.verl.glm4v",
    "avar_verl.compat.metrics": "avar_verl.plugin.compat.verl.metrics",
    "avar_verl.compat.packed_attention": "avar_verl.plugin.compat.verl.packed_attention",
    "avar_verl.compat.position_ids": "avar_verl.plugin.compat.verl.position_ids",
    "avar_verl.compat.processor": "avar_verl.plugin.compat.verl.processor",
    "avar_verl.compat.rollout_features": "avar_verl.plugin.compat.verl.rollout_features",
    "avar_verl.compat.text_only": "avar_verl.plugin.compat.verl.text_only",
    "avar_verl.compat.weight_names": "avar_verl.plugin.compat.verl.weight_names",
    "avar_verl.config": "avar_verl.plugin.config",
    "avar_verl.data.check_rendered": "avar_verl.plugin.datasets.check_rendered",
    "avar_verl.data.region_dataset": "avar_verl.plugin.datasets.region",
    "avar_verl.data.sft_dataset": "avar_verl.plugin.datasets.sft",
    "avar_verl.data.table": "avar_verl.data.rows",
    "avar_verl.demo": "avar_verl.tools.demo",
    "avar_verl.doctor": "avar_verl.tools.doctor",
    "avar_verl.engine": "avar_verl.plugin.engine",
    "avar_verl.engine_config": "avar_verl.plugin.engine.config",
    "avar_verl.evaluation": "avar_verl.tools.evaluate",
    "avar_verl.evaluation.grade": "avar_verl.tools.grade",
    "avar_verl.evaluation.items": "avar_verl.tools.questions",
    "avar_verl.evaluation.records": "avar_verl.tools.records",
    "avar_verl.evaluation.statistics": "avar_verl.tools.stats",
    "avar_verl.families": "avar_verl.model.families",
    "avar_verl.families.family": "avar_verl.model.family",
    "avar_verl.families.turns": "avar_verl.model.turns",
    "avar_verl.figures": "avar_verl.tools.figures",
    "avar_verl.freeze": "avar_verl.model.freeze",
    "avar_verl.intervention.answers": "avar_verl.tools.generate.answers",
    "avar_verl.intervention.command": "avar_verl.tools.generate.command",
    "avar_verl.intervention.sweep": "avar_verl.tools.generate.sweep",
    "avar_verl.measure": "avar_verl.tools.vas.score",
    "avar_verl.objectives.reward": "avar_verl.objectives.vars",
    "avar_verl.regions": "avar_verl.model.regions",
    "avar_verl.register": "avar_verl.plugin.register",
    "avar_verl.render": "avar_verl.model.render",
    "avar_verl.rewards.offline": "avar_verl.tools.rewards.offline",
    "avar_verl.rollout": "avar_verl.plugin.rollout",
    "avar_verl.synth": "avar_verl.tools.synth",
    "avar_verl.trainer": "avar_verl.plugin.trainer",
    "avar_verl.trainer.grpo": "avar_verl.plugin.trainer.ppo",
    "avar_verl.vas": "avar_verl.tools.vas",
    "avar_verl.vas.figures": "avar_verl.tools.figures",
    "avar_verl.vas.records": "avar_verl.tools.runs",
    "avar_verl.vas.rows": "avar_verl.tools.rows",
    "avar_verl.vllm_plugin": "avar_verl.plugin.vllm_plugin",
}

# `from avar_verl.trainer import grpo`: the import system asks the moved package for its module.
MOVED |= {
    f"{MOVED[parent]}.{child}": new
    for parent, _, child, new in [(*old.rpartition("."), new) for old, new in MOVED.items()]
    if parent in MOVED
}


def warn(old: str, new: str) -> None:
    """Tell the user of an old name the new one."""
    warnings.warn(f"{old} is now {new}; the old name goes away with the next release.", FutureWarning, stacklevel=3)


def new_name(old: str) -> str | None:
    """The new name of an old module, or None for a module that is where it was.

    >>> new_name("avar_verl.vas.rows")
    'avar_verl.tools.rows'
    """
    head, tail = old, ""
    while head not in MOVED:
        head, dot, last = head.rpartition(".")
        if not dot:
            return None
        tail = f".{last}{tail}"
    return MOVED[head] + tail


class Loader:
    """Gives the new module for an old name, and warns."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = new_name(spec.name)
        module = importlib.import_module(new)
        self.spec = module.__spec__
        warn(spec.name, new)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module has run. Its spec, which the import system has replaced, is put back."""
        module.__spec__ = self.spec

    def get_code(self, name: str) -> CodeType:
        """For `python -m`."""
        new = new_name(name)
        warn(name, new)
        return importlib.util.find_spec(new).loader.get_code(new)


class Finder:
    """Finds the old names. First in `sys.meta_path`: a moved package would load its modules a second time."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        known = name.startswith("avar_verl.") and new_name(name) is not None
        return ModuleSpec(name, Loader()) if known else None


def install() -> None:
    """Let the old names be found."""
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
